"""The `bitsandbytes` layout: the names, dtypes and config with which transformers loads int8 weights directly.

A quantized `X.weight` becomes `X.weight` int8 (out, in), `X.SCB` float32 (out,) with the undivided row_absmax, and
`X.weight_format` uint8 scalar 0 (row-major). Format: the state dict of bitsandbytes' `Linear8bitLt`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from int8cli.checkpoint.tensor import TensorSpec
from int8cli.loaders.expressions import NOT_AN_EXPRESSION
from int8cli.planning.decisions import Acceptance, Plan
from int8cli.planning.layouts.skip_modules import covers, skip_modules

NAME = KEY = "bitsandbytes"
INPUTS = "absmax"  # and those over the threshold in 16 bit
ACCEPTS = Acceptance()
SCALES: Literal["row_absmax", "step"] = "row_absmax"
PACKED = False
AS_ON_LOAD = True
SKIP_KEY = "llm_int8_skip_modules"
WEIGHT_FORMAT = b"\x00"  # bitsandbytes' number for row-major


def module_name(weight_name: str) -> str:
    """`h.0.mlp.dense` for `h.0.mlp.dense.weight`."""
    return weight_name.removesuffix(".weight")


def scale_name(weight_name: str) -> str:
    return f"{module_name(weight_name)}.SCB"


def weight_format_name(weight_name: str) -> str:
    return f"{module_name(weight_name)}.weight_format"


def quantized_specs(source: TensorSpec, *, transpose: bool) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """The output's tensors for a weight: int8 data, scales, format mark. `transpose`: the source is (in, out)."""
    out_features, in_features = reversed(source.shape) if transpose else source.shape
    return (
        TensorSpec(source.name, "I8", (out_features, in_features)),
        TensorSpec(scale_name(source.name), "F32", (out_features,)),
        TensorSpec(weight_format_name(source.name), "U8", ()),
    )


def data_name(weight_name: str) -> str:
    return weight_name


def marks(weight_name: str, shape: tuple[int, ...]) -> dict[str, bytes]:
    return {weight_format_name(weight_name): WEIGHT_FORMAT}


def quantization_config(plan: Plan, threshold: float) -> dict[str, Any]:
    """The `quantization_config` of config.json, with the fields that transformers' BitsAndBytesConfig writes."""
    return {
        "quant_method": NAME,
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": threshold,
        SKIP_KEY: skip_modules(plan),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def transformers_reads(tensor_names: Iterable[str]) -> bool:
    return True


def caveats(plan: Plan, config: Mapping[str, Any]) -> Iterator[str]:
    yield from ()


def leaves_alone(entry: str, module: str) -> bool:
    try:
        return covers(entry, module)
    except NOT_AN_EXPRESSION:
        return False  # the loader reports it
