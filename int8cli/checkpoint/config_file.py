"""config.json of a source, read with a size limit.

Owns which fields a plan needs, and their types. Nothing else in the file is checked.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

from int8cli.checkpoint.source import Source
from int8cli.errors import CheckpointError
from int8cli.typed_json import InvalidJsonError, parse_json, read_as, shown

CONFIG_FILE = "config.json"
_LIMIT_BYTES = 100_000_000
# Names of fields with a number of layers, as num_hidden_layers and n_layer: a builder makes as many modules.
_COUNTS_LAYERS = re.compile(r"(^|_)(layers?|depth)$")
MOST_LAYERS = 10_000


def read_config(source: Source) -> dict[str, Any]:
    """The config of a source that has one. Raises CheckpointError, naming the invalid field.

    NaN, infinities and repeated keys are accepted, as transformers accepts them.
    """
    size_bytes = source.size_bytes(CONFIG_FILE)
    if size_bytes > _LIMIT_BYTES:
        raise CheckpointError(f"{CONFIG_FILE} has {size_bytes:,} bytes, too large for a config")
    with source.open(CONFIG_FILE) as file:
        text = file.read(size_bytes)
    try:
        return _checked(parse_json(text, unique_keys=False))
    except InvalidJsonError as error:
        raise CheckpointError(f"{CONFIG_FILE}: {error}", hint="Get the file again, or correct it.") from error


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
    """Check the model type and the numbers of layers of a config and of those inside it, such as text_config."""
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
