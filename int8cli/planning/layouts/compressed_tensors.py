"""The `compressed-tensors` layout: int8 weights by channel as vLLM and transformers + compressed-tensors read them.

Owns what stands in the output for a quantized `X.weight`: `X.weight` int8 (out, in) and `X.weight_scale` float32
(out, 1), the quantization step row_absmax / 127. Format: `int-quantized` of github.com/vllm-project/compressed-tensors.

The scale is float32 whatever the model's dtype: vLLM holds it so (compressed_tensors_w8a8_int8.py), and transformers
casts it to the model's dtype on load, so that nothing is lost before a loader chooses to lose it. Where a row holds
only zeros the scale is float32's epsilon, as compressed-tensors' own observers have it: nobody who divides by it gets
NaN.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from int8cli.checkpoint.tensor import TensorSpec
from int8cli.loaders.transformers_versions import covers_by_component
from int8cli.planning.layouts.skip_modules import skip_modules
from int8cli.planning.plan import Acceptance, Plan

NAME = "compressed-tensors"
# The loaders replace what is an `nn.Linear` or, in vLLM, made of them: experts that are stored one by one too.
# transformers' Conv1D is neither, and vLLM turns what it reads for one.
ACCEPTS = Acceptance(experts=True, conv1d=False)
SCALES: Literal["row_absmax", "step"] = "step"
AS_ON_LOAD = False
SKIP_KEY = "ignore"

_EXPERT = re.compile(r"\.experts\.\d+\.")
_MERGED_IN_VLLM = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_PLAIN_ENTRY = re.compile(r"[\w.]+")


def scale_name(weight_name: str) -> str:
    return f"{weight_name}_scale"


def marks(weight_name: str) -> dict[str, bytes]:
    return {}


def quantized_specs(source: TensorSpec, *, transpose: bool) -> tuple[TensorSpec, TensorSpec]:
    """What the output holds for a weight: int8 data, scales. `transpose`: the source is (in, out)."""
    out_features, in_features = reversed(source.shape) if transpose else source.shape
    return (
        TensorSpec(source.name, "I8", (out_features, in_features)),
        TensorSpec(scale_name(source.name), "F32", (out_features, 1)),
    )


def quantization_config(plan: Plan, threshold: float) -> dict[str, Any]:
    """The `quantization_config` of config.json. This format has no place for an outlier threshold."""
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": NAME,
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        SKIP_KEY: ignore(plan),
        "kv_cache_scheme": None,
    }


def ignore(plan: Plan) -> list[str]:
    """The entries that make the loaders leave alone every linear layer that the plan leaves alone, and no other.

    An entry covers a module when it is its name or, after `re:`, a regular expression that matches from its start
    (compressed_tensors, utils/match.py, `match_name`; vLLM, compressed_tensors/utils.py). Subclasses of `nn.Linear`
    are replaced too.
    """
    return [_as_pattern(entry) for entry in skip_modules(plan, (covers_by_component, _covers))]


def transformers_reads(tensor_names: Iterable[str]) -> bool:
    """False for mixtures of experts stored one by one: what transformers merges of this format is packed int4."""
    return not any(_EXPERT.search(name) for name in tensor_names)


def caveats(plan: Plan) -> Iterator[str]:
    """That transformers does not read a mixture, and layers that vLLM merges into one but cannot in two precisions."""
    if not transformers_reads(decision.spec.name for decision in plan.decisions):
        yield "transformers cannot read mixtures of experts in this layout; vLLM can"
    fates: dict[str, set[bool]] = {}
    for decision in plan.decisions:
        block, _, leaf = decision.module.rpartition(".")
        merged = next((group for group in _MERGED_IN_VLLM if leaf in group), None)
        if merged is not None and decision.spec.name.endswith(".weight"):
            fates.setdefault(f"{block}.({'|'.join(merged)})", set()).add(decision.quantize)
    for layers in (layers for layers, quantized in fates.items() if len(quantized) == 2):
        yield f"vLLM merges {layers} into one layer, which cannot mix int8 and float weights"


def leaves_alone(entry: str, module: str) -> bool:
    if not entry.startswith("re:"):
        return entry == module
    try:
        return re.match(entry.removeprefix("re:"), module) is not None
    except re.error:
        return False  # the loader will say so itself


def _covers(entry: str, module: str) -> bool:
    """Whether an entry of `llm_int8_skip_modules` covers a module once it is written as this format has it."""
    return leaves_alone(_as_pattern(entry), module)


def _as_pattern(entry: str) -> str:
    """An entry of `llm_int8_skip_modules`, a suffix or a pattern up to a dot or the end, in this format's terms."""
    if _PLAIN_ENTRY.fullmatch(entry):
        return rf"re:(?:.*\.)?{re.escape(entry)}$"
    return rf"re:(?:{entry})(?:\.|$)" if not entry.endswith("$") else f"re:{entry}"
