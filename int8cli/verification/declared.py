"""What config.json must tell loaders of each kind of output, written down apart from the layouts that write it.

Owns the meaning of the fields: bitsandbytes' as in transformers' BitsAndBytesConfig, the others as in
compressed_tensors' QuantizationScheme.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from int8cli.records.conversion import WEIGHTS_ONLY, Settings

_BITSANDBYTES = "bitsandbytes"
_ZERO_POINT = "zeropoint"


def misstated(stated: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    """Each field of `quantization_config` that does not say what the settings made, with what it must be."""
    for path, due in _due(settings).items():
        found = _at(stated, path)
        if found != due:
            yield f"quantization_config.{path} is {found!r}; for what was made it must be {due!r}"


def _due(settings: Settings) -> dict[str, Any]:
    if settings.layout == _BITSANDBYTES:
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": settings.threshold,
        }
    due: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if settings.inputs == WEIGHTS_ONLY else "int-quantized",
        "config_groups.group_0.targets": ["Linear"],
        "config_groups.group_0.weights.num_bits": 8,
        "config_groups.group_0.weights.type": "int",
        "config_groups.group_0.weights.symmetric": True,
        "config_groups.group_0.weights.strategy": "channel",
    }
    inputs = "config_groups.group_0.input_activations"
    if settings.inputs == WEIGHTS_ONLY:
        return {**due, inputs: None}
    return {
        **due,
        f"{inputs}.num_bits": 8,
        f"{inputs}.type": "int",
        f"{inputs}.symmetric": settings.inputs != _ZERO_POINT,
        f"{inputs}.strategy": "token",
        f"{inputs}.dynamic": True,
    }


def _at(stated: Any, path: str) -> Any:
    for key in path.split("."):
        stated = stated.get(key) if isinstance(stated, Mapping) else None
    return stated
