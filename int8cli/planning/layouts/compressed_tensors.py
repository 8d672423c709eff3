"""The `compressed-tensors` layout: int8 weights by channel, for vLLM, and for transformers with compressed-tensors.

A quantized `X.weight` becomes `X.weight` int8 (out, in) and `X.weight_scale` float32 (out, 1), the quantization step
row_absmax / 127. Format: `int-quantized` of github.com/vllm-project/compressed-tensors.

The scale is float32 for every dtype of the model. vLLM uses it so (compressed_tensors_w8a8_int8.py), and transformers
casts it to the model's dtype on load. For a row of zeros the scale is float32's epsilon, as in compressed-tensors' own
observers, so that dividing by it never gives NaN.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from int8cli.checkpoint.tensor import TensorSpec
from int8cli.loaders.conversions import fails_on_load
from int8cli.loaders.expressions import NOT_AN_EXPRESSION
from int8cli.loaders.transformers_versions import covers_by_component
from int8cli.planning.decisions import Acceptance, FloatLayers, Plan
from int8cli.planning.layouts.skip_modules import skip_modules

NAME = KEY = "compressed-tensors"
INPUTS = "absmax"
# The loaders replace every `nn.Linear`; vLLM also replaces layers made of them, such as separate experts. transformers'
# Conv1D is not one, and vLLM transposes the weights that it reads for it.
# vLLM builds some linear layers without a quantization config (0.32: qwen2_moe.py, qwen3_next.py, mamba_mixer.py), and
# `dt_proj` is computed by its weight itself, which no loader does with int8. Many projectors and towers of models that
# see or hear are without a config, too (paligemma.py, pixtral.py, qwen2_audio.py, lfm2_vl.py and others). They are
# small, no text reaches them in calibration, and the recipes of llm-compressor leave them in floats.
ACCEPTS = Acceptance(
    experts=True,
    conv1d=False,
    floats=(
        FloatLayers(re.compile(r"(?:^|\.)shared_expert_gate$")),
        FloatLayers(re.compile(r"(?:^|\.)dt_proj$")),
        FloatLayers(re.compile(r"\.mamba\.(?:in|x|out)_proj$"), frozenset({"jamba"})),
    ),
    language_model_only=True,
)
SCALES: Literal["row_absmax", "step"] = "step"
PACKED = False
AS_ON_LOAD = False
SKIP_KEY = "ignore"

_EXPERT = re.compile(r"\.experts\.\d+\.")
_EXPERTS_OF_A_LAYER = re.compile(r"(?P<experts>\S+\.experts)\.\d+\.")
# Layers beside each other that vLLM loads into one (0.32, `packed_modules_mapping` and `orig_to_new_stacked`).
_MERGED_IN_VLLM: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
# vLLM takes fused experts for quantized layers unless an entry covers the names of single ones.
FUSED_EXPERTS_ENTRY = r"re:.*\.experts(\.|$)"
_FUSED_EXPERTS = re.compile(
    r"(?P<experts>(?:\S+\.)?experts)\.(?!\d+\.)|(?P<granite>\S+\.block_sparse_moe)\.(?:in|out)put_linear\.weight$"
)
# vLLM builds the mixers of Mamba's first version without a quantization config (0.32: mamba.py, mamba_mixer.py).
_MAMBA_MIXER = re.compile(r"\S+\.mixer\.x_proj(?:\.weight)?$")
_PLAIN_ENTRY = re.compile(r"[\w.]+")


def scale_name(weight_name: str) -> str:
    return f"{weight_name}_scale"


def data_name(weight_name: str) -> str:
    return weight_name


def marks(weight_name: str, shape: tuple[int, ...]) -> dict[str, bytes]:
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
    entries = [_as_pattern(entry) for entry in skip_modules(plan, (covers_by_component, _covers))]
    return entries + _fused_entries(plan)


def _fused_entries(plan: Plan) -> list[str]:
    """Entries for fused experts that stay floats: one for all, or one for each layer if others have int8 experts."""
    floats = [each.spec for each in plan.copied if len(each.spec.shape) >= 2]
    found = [match for spec in floats if (match := _FUSED_EXPERTS.match(spec.name))]
    if found and any(leaves_alone(FUSED_EXPERTS_ENTRY, decision.module) for decision in plan.quantized):
        modules = {match["experts"] or f"{match['granite']}.experts" for match in found}
        return [rf"re:(?:.*\.)?{re.escape(module)}(\.|$)" for module in sorted(modules)]
    return [FUSED_EXPERTS_ENTRY] if found else []


def transformers_reads(tensor_names: Iterable[str]) -> bool:
    """False for mixtures of experts that are stored separately: transformers merges them only in packed int4."""
    return not any(_EXPERT.search(name) for name in tensor_names)


def vllm_reads(int8_layers: Iterable[str]) -> bool:
    """False for Mamba's first version and Falcon-Mamba, by the names of layers or of their weights."""
    return not any(_MAMBA_MIXER.match(name) for name in int8_layers)


def caveats(plan: Plan, config: Mapping[str, Any]) -> Iterator[str]:
    """Warns of models that a loader cannot read, and of what vLLM has in one piece although only a part is int8."""
    if not transformers_reads(decision.spec.name for decision in plan.decisions):
        yield "transformers cannot read mixtures of experts in this layout; vLLM and load_model can"
    if not vllm_reads(decision.module for decision in plan.quantized):
        yield "vLLM cannot open this: it has the mixers of Mamba only in floats; transformers and load_model can"
    if found := fails_on_load([each.spec.name for each in plan.copied], config):  # leaving layers alone would not help
        yield (
            "transformers 5.24 cannot open this: it fails in this layout where it merges or splits weights on load, "
            f"such as {found}; load_model can"
        )
    for (merged, leaf), parents in _mixed(plan).items():
        siblings = ", ".join(f"*.{parents[0].rpartition('.')[2]}.{name}" for name in merged if name not in leaf)
        where = parents[0] if len(parents) == 1 else f"{len(parents)} layers, the first {parents[0]},"
        yield (
            f"vLLM merges {', '.join(merged)} of {where} into one layer, which cannot mix int8 and float weights; "
            f"leave the others alone too: {siblings}"
        )
    if layers := _partly_int8_experts(plan):
        where = layers[0] if len(layers) == 1 else f"{len(layers)} layers, the first {layers[0]},"
        yield (
            f"vLLM reads the experts of a layer all in int8 or all in floats, and those of {where} are both; leave the "
            f"others alone too: *.{layers[0].rpartition('.')[2]}.*"
        )


def _partly_int8_experts(plan: Plan) -> list[str]:
    """The experts of layers that have some matrices in int8 and some in floats."""
    fates: dict[str, set[bool]] = {}
    for decision in plan.decisions:
        match = _EXPERTS_OF_A_LAYER.match(decision.spec.name)
        if match is not None and decision.spec.name.endswith(".weight"):
            fates.setdefault(match["experts"], set()).add(decision.quantize)
    return [experts for experts, quantized in fates.items() if len(quantized) == 2]


def _mixed(plan: Plan) -> dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]]:
    """The parents of layers that vLLM merges although only some are int8, by the group and the names that are not."""
    fates: dict[tuple[str, tuple[str, ...]], dict[str, bool]] = {}
    for decision in plan.decisions:
        parent, _, leaf = decision.module.rpartition(".")
        merged = next((group for group in _MERGED_IN_VLLM if leaf in group), None)
        if merged is not None and decision.spec.name.endswith(".weight"):
            fates.setdefault((parent, merged), {})[leaf] = decision.quantize
    found: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for (parent, merged), quantized in fates.items():
        if len(set(quantized.values())) == 2:
            left_alone = tuple(name for name in merged if quantized.get(name) is not True)
            found.setdefault((merged, left_alone), []).append(parent)
    return found


def leaves_alone(entry: str, module: str) -> bool:
    if not entry.startswith("re:"):
        return entry == module
    try:
        return re.match(entry.removeprefix("re:"), module) is not None
    except NOT_AN_EXPRESSION:
        return False  # the loader reports it


def _covers(entry: str, module: str) -> bool:
    """Whether an entry of `llm_int8_skip_modules` covers a module once it is written as this format has it."""
    return leaves_alone(_as_pattern(entry), module)


def _as_pattern(entry: str) -> str:
    """An entry of `llm_int8_skip_modules` (a suffix, or a pattern up to a dot or the end) in this format's syntax."""
    if _PLAIN_ENTRY.fullmatch(entry):
        return rf"re:(?:.*\.)?{re.escape(entry)}$"
    return rf"re:(?:{entry})(?:\.|$)" if not entry.endswith("$") else f"re:{entry}"
