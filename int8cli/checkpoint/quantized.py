"""The marks of checkpoints that are quantized already, whoever made them.

Owns the tensor names and dtypes by which they are told. Knows how none of these formats computes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from int8cli.checkpoint.tensor import ShardContents
from int8cli.errors import AlreadyQuantizedError

# What the formats of quantized checkpoints store beside a weight: bitsandbytes 8 and 4 bit; GPTQ and AWQ;
# compressed-tensors; AQLM, HQQ, EETQ; Quanto. The name alone is enough.
_COMPANION_NAME = re.compile(
    r"\.(SCB|qweight|qzeros|weight_packed|weight_shape|W_q|weight_scales|weight\._data|weight\._scale"
    r"|weight\.(absmax|quant_map|nested_absmax|quant_state\..+))$"
)
# These are companions of a weight of 8 bits or fewer, and may be something else beside a float.
_SCALE_NAME = re.compile(r"(?P<weight>.*\.weight)_scale(_inv|_2)?")
_PACKED_DTYPES = frozenset({"I8", "U8", "I32", "U32"})


def refuse_quantized(config: Mapping[str, Any], shards: Sequence[ShardContents]) -> None:
    """Raise AlreadyQuantizedError if companion tensors or dtypes show that the weights are already quantized.

    A `quantization_config` with only 16- and 32-bit weights is not a sign: it asks the loader to quantize.
    """
    dtypes = {tensor.spec.name: tensor.spec.dtype for contents in shards for tensor in contents.tensors}
    shapes = {tensor.spec.name: tensor.spec.shape for contents in shards for tensor in contents.tensors}
    declared = config.get("quantization_config")
    for name, dtype in dtypes.items():
        sign = _companion_sign(name, dtypes)
        if not sign and declared and len(shapes[name]) >= 2 and _is_packed(name, dtype):
            sign = f"config.json has a quantization_config, and the weight is {dtype}"
        if sign:
            method = declared.get("quant_method") if isinstance(declared, Mapping) else None
            raise AlreadyQuantizedError(
                f"the checkpoint is already quantized{f' ({method})' if method else ''}: {name!r}: {sign}",
                hint="Convert the 16- or 32-bit original: quantizing twice adds to the error.",
            )


def _is_packed(name: str, dtype: str) -> bool:
    """Whether a tensor of two or more dimensions is a quantized weight: masks and position ids are integers too."""
    return dtype.startswith(("F4", "F6", "F8")) or (dtype in _PACKED_DTYPES and name.endswith("weight"))


def _companion_sign(name: str, dtypes: Mapping[str, str]) -> str | None:
    """Why a tensor's name is a sign of quantized weights, in words; None if it is not."""
    if _COMPANION_NAME.search(name):
        return "such tensors belong to quantized weights"
    scaled = _SCALE_NAME.fullmatch(name)
    if scaled and _is_packed(scaled["weight"], dtypes.get(scaled["weight"], "")):
        return "a scale of an 8-bit weight"
    scales = name.removesuffix("_blocks") + "_scales"
    if name.endswith("_blocks") and dtypes[name] == "U8" and dtypes.get(scales) == "U8":
        return f"a block of packed weights, with {scales}"
    return None
