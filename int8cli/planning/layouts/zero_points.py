"""The `compressed-tensors` layout for loaders that give inputs a zero point: the same tensors, another config.json.

`input_activations` with `symmetric: false` makes a loader quantize each token to [-128, 127] with an offset, which uses
the whole range where inputs are not centred on zero. vLLM's dense int8 layers and transformers compute it; vLLM's
experts and SGLang ignore it, and compute as without it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from int8cli.planning.decisions import Plan
from int8cli.planning.layouts import compressed_tensors as base

NAME, KEY, INPUTS = base.NAME, f"{base.NAME} zeropoint", "zeropoint"
ACCEPTS = base.ACCEPTS
SCALES: Literal["row_absmax", "step"] = base.SCALES
AS_ON_LOAD = base.AS_ON_LOAD
SKIP_KEY = base.SKIP_KEY
PACKED = base.PACKED
data_name, scale_name, marks, quantized_specs = base.data_name, base.scale_name, base.marks, base.quantized_specs
transformers_reads, leaves_alone = base.transformers_reads, base.leaves_alone


def quantization_config(plan: Plan, threshold: float) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    config = base.quantization_config(plan, threshold)
    config["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
    return config


def caveats(plan: Plan, config: Mapping[str, Any]) -> Iterator[str]:
    yield from base.caveats(plan, config)
    yield "SGLang ignores the zero points of inputs without a warning; vLLM and transformers compute them"
    if not transformers_reads(decision.spec.name for decision in plan.decisions):
        yield "vLLM computes experts without the zero points"
