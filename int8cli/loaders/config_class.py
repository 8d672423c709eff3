"""A config.json as transformers' configuration class completes it.

Owns what of that class is used: its defaults, its names for fields, its choice of the language model's part. The class
is looked up by model type among those of transformers itself, so no code of a model's repository is run.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LEFT_OUT = ("quantization_config", "auto_map")  # nothing of the sizes asked for depends on them


class NoConfigClassError(LookupError):
    """transformers has no class for this config, or its class rejects it. The message says which."""


def completed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every field that its class has, under the class's names and under the common ones.

    The language model's part, where it is not the whole, is `text_config`. Imports transformers. Raises
    NoConfigClassError, and ImportError without transformers.
    """
    import transformers

    loader = f"transformers {transformers.__version__}"
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise NoConfigClassError(f"{loader} does not know the model type {model_type!r}")
    try:
        made = _made(transformers.CONFIG_MAPPING[model_type], config)
        found: dict[str, Any] = json.loads(json.dumps(described(made), default=str))
    except Exception as error:  # whatever the class raises, the loader would raise too
        line = next(iter(str(error).strip().splitlines()), "")
        raise NoConfigClassError(f"{loader} rejects config.json ({type(error).__name__}: {line})") from error
    return found


def _made(config_class: Any, config: Mapping[str, Any]) -> Any:
    """The class's object, read from a file as loaders read it: some values have a form of their own there."""
    with tempfile.TemporaryDirectory(prefix="int8cli-config-") as directory:
        stated = {name: value for name, value in config.items() if name not in _LEFT_OUT}
        Path(directory, "config.json").write_text(json.dumps(stated), encoding="utf-8")
        return config_class.from_pretrained(directory, local_files_only=True)


def described(config: Any) -> dict[str, Any]:
    """The fields of a configuration object, the common names beside the class's own."""
    found: dict[str, Any] = config.to_dict()
    for common, own in (getattr(config, "attribute_map", None) or {}).items():
        found.setdefault(common, found.get(own))
    text = config.get_text_config(decoder=True)  # of an encoder-decoder: a copy of the whole
    return found if type(text) is type(config) else {**found, "text_config": described(text)}
