"""The `compressed-tensors` layout for weights alone, with inputs in 16 bit (W8A16).

A quantized `X.weight` becomes `X.weight_packed` int32 (out, in / 4), `X.weight_scale` float32 (out, 1), which is the
step row_absmax / 127, and `X.weight_shape` int64 (2,). Each int32 has four values as unsigned bytes, the first in the
lowest: data + 128. Format: `pack-quantized` of github.com/vllm-project/compressed-tensors, num_bits 8, by channel.
"""

import struct
from typing import Any, Literal

from int8cli.checkpoint.tensor import TensorSpec
from int8cli.errors import UnsupportedModelError
from int8cli.planning.decisions import Plan
from int8cli.planning.layouts import compressed_tensors as base

NAME, KEY, INPUTS = base.NAME, f"{base.NAME} none", "none"
FORMAT = "pack-quantized"
ACCEPTS = base.ACCEPTS
SCALES: Literal["row_absmax", "step"] = base.SCALES
AS_ON_LOAD = base.AS_ON_LOAD
PACKED = True
SKIP_KEY = base.SKIP_KEY
VALUES_A_WORD = 4
scale_name, transformers_reads = base.scale_name, base.transformers_reads
caveats, leaves_alone = base.caveats, base.leaves_alone


def data_name(weight_name: str) -> str:
    return f"{weight_name}_packed"


def shape_name(weight_name: str) -> str:
    return f"{weight_name}_shape"


def marks(weight_name: str, shape: tuple[int, ...]) -> dict[str, bytes]:
    return {shape_name(weight_name): struct.pack("<2q", *shape)}


def quantized_specs(source: TensorSpec, *, transpose: bool) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """The output's tensors for a weight: packed data, scales, shape. Raises UnsupportedModelError."""
    out_features, in_features = reversed(source.shape) if transpose else source.shape
    if in_features % VALUES_A_WORD:
        raise UnsupportedModelError(
            f"{source.name} has {in_features:,} input columns, which cannot be packed by {VALUES_A_WORD}",
            hint="Leave it in 16 bit, or let inputs be int8 too.",
        )
    return (
        TensorSpec(data_name(source.name), "I32", (out_features, in_features // VALUES_A_WORD)),
        TensorSpec(scale_name(source.name), "F32", (out_features, 1)),
        TensorSpec(shape_name(source.name), "I64", (2,)),
    )


def quantization_config(plan: Plan, threshold: float) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    config = base.quantization_config(plan, threshold)
    config["config_groups"]["group_0"]["input_activations"] = None
    return {**config, "format": FORMAT}
