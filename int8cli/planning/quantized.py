"""Whether a checkpoint is quantized already, whoever made it.

Owns the signs: what tensors and config.json of a quantized checkpoint have in common. A format is told by what stands
in the place of its weights, so that one which nobody has listed is told too. Knows how none of them computes.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from int8cli.checkpoint.output_names import CONVERSION_FILE
from int8cli.checkpoint.tensor import DTYPE_BITS, ShardContents, TensorSpec
from int8cli.errors import AlreadyConvertedError, AlreadyQuantizedError
from int8cli.planning.architectures import LINEAR_NAME

# Names that belong to quantized weights alone: bitsandbytes 8 and 4 bit; GPTQ and AWQ; compressed-tensors; HQQ, EETQ;
# Quanto; scaled fp8. Tensors of these names are a sign whatever their dtype.
_COMPANION_NAME = re.compile(
    r"(?:^|\.)(?:SCB|qweight|qzeros|weight_packed|weight_shape|W_q|weight_scales|weight\._data|weight\._scale"
    r"|weight\.(?:absmax|quant_map|nested_absmax|quant_state\..+)|scaled_fp8)$"
)
_SCALE_NAME = re.compile(r"scal(?:e|ing)|absmax", re.IGNORECASE)
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
# No one trains in these: they are codes.
_CODES = ("F4", "F6_")
# What a config calls the description of a quantization. Without a method by name, one of these fields shows it.
_SECTION_NAME = re.compile(r"quantization(?:_config)?|quant(?:ization)?_config|compression_config")
_SECTION_FIELDS = frozenset({"bits", "w_bit", "group_size", "config_groups", "load_in_4bit", "load_in_8bit"})
# What a config names for the loader to do with plain weights. Any other method says how stored weights are to be read.
_ASKED_OF_THE_LOADER = frozenset({"bitsandbytes", "unnamed"})


def refuse_own_output(name: str, files: Iterable[str]) -> None:
    """Raise AlreadyConvertedError for the files of a conversion of ours."""
    if CONVERSION_FILE in files:
        raise AlreadyConvertedError(f"{name} is already int8: int8cli wrote it")


def refuse_quantized(shards: Sequence[ShardContents], methods: Sequence[str], understood: Collection[str] = ()) -> None:
    """Raise AlreadyQuantizedError if tensors, or `methods` that the source names, show that its weights are quantized.

    `understood` are methods whose tensors are already read as floats. A method that no tensor shows stops it too: under
    some (BitNet, pseudo-quantization) the floats of the files are not the model's weights. A `quantization_config` of
    bitsandbytes over plain weights is not a sign: it asks the loader to quantize.
    """
    named = f" ({', '.join(methods)})" if methods else ""
    sign = next(_signs(shards, methods), None)
    if sign:
        raise AlreadyQuantizedError(
            f"the checkpoint is already quantized{named}: {sign}",
            hint="Convert the 16- or 32-bit original: quantizing twice adds to the error.",
        )
    if not {*understood, *_ASKED_OF_THE_LOADER}.issuperset(methods):
        raise AlreadyQuantizedError(
            f"config.json says that the weights are already quantized{named}, and no tensor shows how: what its floats "
            "stand for is not known",
            hint="If they are the weights themselves, as in a model that was dequantized, remove that section from "
            "config.json and run again.",
        )


def declared_methods(config: Mapping[str, Any]) -> Iterator[str]:
    """The quantization methods that a config names, at any depth; `unnamed` for a section that names none."""
    if _is_of_the_cache_alone(config):
        return
    for key, value in config.items():
        if key == "quant_method" and isinstance(value, str):
            yield value
        for inner in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(inner, Mapping):
                continue
            yield from declared_methods(inner)
            unnamed = not isinstance(inner.get("quant_method"), str)
            if unnamed and _SECTION_NAME.fullmatch(key) and not _SECTION_FIELDS.isdisjoint(inner):
                yield "unnamed"


def _is_of_the_cache_alone(section: Mapping[str, Any]) -> bool:
    """Whether a section of compressed-tensors has a scheme for the KV cache and none for any weight."""
    return (
        section.get("quant_method") == "compressed-tensors"
        and bool(section.get("kv_cache_scheme"))
        and not section.get("config_groups")
        and not section.get("sparsity_config")
    )


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, and each config in it, without the sections that describe a quantization."""
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not is_quantization(key, value)
    }


def is_quantization(key: str, value: object) -> bool:
    """Whether a field of a config describes how its weights are quantized."""
    if key == "quantization_config":
        return True
    if not isinstance(value, Mapping) or not _SECTION_NAME.fullmatch(key):
        return False
    return "quant_method" in value or not _SECTION_FIELDS.isdisjoint(value)


def _signs(shards: Iterable[ShardContents], methods: Sequence[str]) -> Iterator[str]:
    """What shows that weights are quantized, each in words, in the order of the files."""
    modules: defaultdict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for contents in shards:
        for stored in contents.tensors:
            module, _, leaf = stored.spec.name.rpartition(".")
            modules[module][leaf] = stored.spec
    for module, tensors in modules.items():
        has_weight = any(spec.dtype in _FLOATS and _is_weight(spec) for spec in tensors.values())
        scale = next(filter(_SCALE_NAME.search, tensors), None)  # once: a module may have any number of tensors
        for spec in tensors.values():
            why = _sign_by_itself(spec) or _sign_in_module(spec, module, scale, has_weight=has_weight)
            why = why or (_sign_if_declared(spec, has_weight=has_weight) if methods else None)
            if why:
                yield f"{spec.name!r} is {spec.dtype} {list(spec.shape)}: {why}"


def _sign_by_itself(spec: TensorSpec) -> str | None:
    if _COMPANION_NAME.search(spec.name):
        return "such tensors belong to quantized weights"
    if spec.dtype.startswith(_CODES) and len(spec.shape) >= 2:
        return "a dtype of quantized weights"
    if spec.dtype in _INTEGERS and _is_weight(spec):
        return "a weight of integers"
    return None


def _sign_in_module(spec: TensorSpec, module: str, scale: str | None, *, has_weight: bool) -> str | None:
    """A sign that a tensor is together with the others of its module. `scale`: the name of a scale among them.

    Integers are a model's own where they stand beside a weight (a table of a router), in the way of a mask or an index
    of relative positions (square), or of position ids (one row).
    """
    if spec.dtype.startswith("F8") and len(spec.shape) >= 2:
        return f"8-bit floats with a scale, {scale!r}" if scale else None
    if spec.dtype not in _INTEGERS or has_weight or spec.numel <= 1:
        return None
    if scale and len(spec.shape) >= 2 and DTYPE_BITS[spec.dtype] == 8 and spec.shape[0] > 1:
        return f"integers with a scale, {scale!r}"
    if LINEAR_NAME.search(module):
        return "integers in the place of a linear layer's weight"
    rows = tuple(extent for extent in spec.shape if extent > 1)
    if DTYPE_BITS[spec.dtype] <= 32 and len(rows) >= 2 and rows[-1] != rows[-2]:
        return "integers in the place of a weight"
    return None


def _sign_if_declared(spec: TensorSpec, *, has_weight: bool) -> str | None:
    """What is a sign only where config.json names a quantization method."""
    if spec.dtype.startswith("F8") and len(spec.shape) >= 2:
        return "8-bit floats, and config.json names a quantization"
    leaf = spec.name.rpartition(".")[2]
    if has_weight and leaf.startswith(("weight_", "input_")) and _SCALE_NAME.search(leaf):
        return "a scale beside a weight, and config.json names a quantization"
    return None


def _is_weight(spec: TensorSpec) -> bool:
    return len(spec.shape) >= 2 and spec.name.endswith("weight")
