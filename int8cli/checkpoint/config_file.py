"""config.json of a source, read within bounds.

Owns which of its fields must have which type for a plan to be made. All else in it is the model's own.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

from int8cli.checkpoint.source import Source
from int8cli.errors import CheckpointError
from int8cli.typed_json import InvalidJsonError, parse_json, read_as, shown

CONFIG_FILE = "config.json"
_LIMIT_BYTES = 100_000_000
# What counts layers, as num_hidden_layers and n_layer. Whoever builds a model makes as many, or a list as long.
_COUNTS_LAYERS = re.compile(r"(^|_)(layers?|depth)$")
MOST_LAYERS = 10_000


def read_config(source: Source) -> dict[str, Any]:
    """The config of a source that has one. Raises CheckpointError, naming the field that is not as it must be.

    NaN, infinities and repeated keys are taken as transformers takes them.
    """
    size_bytes = source.size_bytes(CONFIG_FILE)
    if size_bytes > _LIMIT_BYTES:
        raise CheckpointError(f"{CONFIG_FILE} has {size_bytes:,} bytes, too large for a config")
    with source.open(CONFIG_FILE) as file:
        text = file.read(size_bytes)
    try:
        return _checked(parse_json(text, unique_keys=False))
    except InvalidJsonError as error:
        raise CheckpointError(f"{CONFIG_FILE}: {error}") from error


def _checked(config: Any) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise InvalidJsonError(f"is {shown(config)}, not an object")
    try:
        read_as(cast(Any, tuple[str, ...] | None), config.get("architectures"))
    except InvalidJsonError as error:
        raise error.inside("architectures") from None
    _check_fields(config)
    return config


def _check_fields(config: Mapping[str, Any]) -> None:
    """A config may hold others, as text_config and vision_config, each with a type and layers of its own."""
    try:
        read_as(cast(Any, str | None), config.get("model_type"))
    except InvalidJsonError as error:
        raise error.inside("model_type") from None
    for name, value in config.items():
        if isinstance(value, int) and value > MOST_LAYERS and _COUNTS_LAYERS.search(name):
            raise InvalidJsonError(f"is {shown(value)}; no model has more than {MOST_LAYERS:,} layers", name)
        if isinstance(value, Mapping):
            try:
                _check_fields(value)
            except InvalidJsonError as error:
                raise error.inside(name) from None
