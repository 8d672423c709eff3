"""config.json as transformers reads it, and the model class and dtype that it specifies.

Only transformers' own code is ever run: a config that needs remote code is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from int8cli.checkpoint.config_file import read_config as read_config_file
from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.disk import raise_if_of_the_system
from int8cli.checkpoint.tensor import QUANTIZABLE_DTYPES, TensorSpec
from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES
from int8cli.errors import CannotRunError
from int8cli.model.extra import require_transformers


def read_config(directory: Path) -> Any:
    """The directory's config.json as transformers reads it, never with the model's own code.

    Raises CheckpointError if it is damaged, CannotRunError if it is missing or transformers does not accept it.
    """
    require_transformers()
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not (directory / "config.json").is_file():
        raise CannotRunError(
            "there is no config.json, so the model cannot be built", hint="Put it next to the weights."
        )
    raw = read_config_file(DirectorySource(directory))
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        own_code = "; the model needs its own code (trust_remote_code), which int8cli never runs"
        raise CannotRunError(
            f"the installed transformers does not know the model type {model_type!r}"
            + (own_code if "auto_map" in raw else ""),
            hint="A newer transformers may support it.",
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise_if_of_the_system(error)
        raise CannotRunError(f"transformers rejects this config.json: {error!s:.300}") from error


def model_class_of(config: Any) -> Any:
    """The class that a config names, or else the bare model of its type. Raises CannotRunError."""
    import transformers

    for architecture in config.architectures or ():
        found = getattr(transformers, architecture, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    bare = bare_class_of(config)
    if bare is None:
        raise CannotRunError(f"transformers has no model for {config.architectures or config.model_type}")
    return bare


def bare_class_of(config: Any) -> Any:
    """The model of a config's type without a head; None if transformers has none."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    found = MODEL_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, (list, tuple)) else found


def dtype_of(config: Any, specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """The dtype of the weights: from the config, as with transformers' `dtype="auto"`, or else the most common one."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    totals = dict.fromkeys(QUANTIZABLE_DTYPES, 0)
    for spec in specs.values():
        if spec.dtype in totals:
            totals[spec.dtype] += spec.numel
    return TORCH_DTYPES[max(sorted(totals), key=lambda dtype: totals[dtype])]
