"""The `compressed-tensors` layout: int8 weights by channel, for vLLM, and for transformers with compressed-tensors.

A quantized `X.weight` becomes `X.weight` int8 (out, in) and `X.weight_scale` float32 (out, 1), the quantization step
row_absmax / 127. Format: `int-quantized` of github.com/vllm-project/compressed-tensors.

The scale is float32 for every dtype of the model. vLLM uses it so (compressed_tensors_w8a8_int8.py), and transformers
casts it to the model's dtype on load. For a row of zeros the scale is float32's epsilon, as in compressed-tensors' own
observers, so that dividing by it never gives NaN.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from int8cli.checkpoint.tensor import TensorSpec
from int8cli.loaders.transformers_versions import covers_by_component
from int8cli.planning.decisions import Acceptance, Plan
from int8cli.planning.layouts.skip_modules import skip_modules

NAME = "compressed-tensors"
# The loaders replace every `nn.Linear`; vLLM also replaces layers made of them, such as separate experts. transformers'
# Conv1D is not one, and vLLM transposes the weights that it reads for it.
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
    """The output's tensors for a weight: int8 data, scales. `transpose`: the source is (in, out)."""
    out_features, in_features = reversed(source.shape) if transpose else source.shape
    return (
        TensorSpec(source.name, "I8", (out_features, in_features)),
        TensorSpec(scale_name(source.name), "F32", (out_features, 1)),
    )


def quantization_config(plan: Plan, threshold: float) -> dict[str, Any]:
    """The `quantization_config` of config.json. This format has no field for an outlier threshold."""
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
    """The entries that make the loaders leave alone exactly the linear layers that the plan leaves alone.

    An entry covers a module if it is the module's name or, after `re:`, a regular expression that matches from the
    name's start (compressed_tensors, utils/match.py, `match_name`; vLLM, compressed_tensors/utils.py). The loaders also
    replace subclasses of `nn.Linear`.
    """
    return [_as_pattern(entry) for entry in skip_modules(plan, (covers_by_component, _covers))]


def transformers_reads(tensor_names: Iterable[str]) -> bool:
    """False for mixtures of experts that are stored separately: transformers merges them only in packed int4."""
    return not any(_EXPERT.search(name) for name in tensor_names)


def caveats(plan: Plan) -> Iterator[str]:
    """Warns of mixtures of experts, and of layers that vLLM merges into one although only some of them are int8."""
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
        return False  # the loader reports it


def _covers(entry: str, module: str) -> bool:
    """Whether an entry of `llm_int8_skip_modules` covers a module once it is written as this format has it."""
    return leaves_alone(_as_pattern(entry), module)


def _as_pattern(entry: str) -> str:
    """An entry of `llm_int8_skip_modules` (a suffix, or a pattern up to a dot or the end) in this format's syntax."""
    if _PLAIN_ENTRY.fullmatch(entry):
        return rf"re:(?:.*\.)?{re.escape(entry)}$"
    return rf"re:(?:{entry})(?:\.|$)" if not entry.endswith("$") else f"re:{entry}"
