"""Mixtures of experts: vLLM loads every int8 matrix into its place, and answers what torch computes.

Its int8 experts want a GPU or AMX, so here torch computes them from the parameters that vLLM registers and loads
(client.py).
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import Tiny, is_known, read_all, read_json
from support.in_vllm import (
    HEADS,
    LLAMA,
    LOST,
    SAME,
    SEQUENCES,
    VOCABULARY,
    Opened,
    Vllm,
    converted,
    in_torch,
    relative_error,
    saved,
)
from torch import Tensor

EXPERTS, FLOAT_EXPERTS = "CompressedTensorsW8A8Int8MoEMethod", "UnquantizedFusedMoEMethod"
INT8, FLOAT = "CompressedTensorsW8A8Int8", "UnquantizedLinearMethod"
STAYS = re.compile(r"\.(gate|router|shared_expert_gate|conv|conv1d|layers\.\d+\.mamba\.\w+)$")
_MOE = {**HEADS, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL = {**HEADS, "num_local_experts": 8, "num_experts_per_tok": 2}
_SHARED = {"shared_expert_intermediate_size": 64}
_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"],
}
_LFM2 = {**LLAMA, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_dense_layers": 1}
_ERNIE = {**LLAMA, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 64}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
# vLLM's latent attention wants heads of 512 + 64.
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
FAMILIES = {
    "mixtral": Tiny("MixtralForCausalLM", "MixtralConfig", {**HEADS, "num_local_experts": 8}),
    "qwen2_moe": Tiny("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_MOE, **_SHARED}),
    "qwen3_moe": Tiny("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _MOE),
    "qwen3_next": Tiny("Qwen3NextForCausalLM", "Qwen3NextConfig", {**_MOE, **_SHARED, **_LINEAR_ATTENTION}),
    "olmoe": Tiny("OlmoeForCausalLM", "OlmoeConfig", {**LLAMA, "num_experts": 8, "num_experts_per_tok": 2}),
    "granitemoe": Tiny("GraniteMoeForCausalLM", "GraniteMoeConfig", _LOCAL),
    "granitemoeshared": Tiny(
        "GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig", {**_LOCAL, "shared_intermediate_size": 64}
    ),
    "llama4": Tiny(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_LOCAL, "num_experts_per_tok": 1, "intermediate_size": 64, "intermediate_size_mlp": 64},
    ),
    "lfm2_moe": Tiny("Lfm2MoeForCausalLM", "Lfm2MoeConfig", {**_LFM2, "layer_types": ["conv", "full_attention"]}),
    "minimax_m2": Tiny(
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        {**_LOCAL, "rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    ),
    "ernie4_5_moe": Tiny("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig", _ERNIE),
    "glm4_moe": Tiny(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {**_MOE, "n_routed_experts": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "jamba": Tiny(
        "JambaForCausalLM",
        "JambaConfig",
        {**LLAMA, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 8},
    ),
    "granitemoehybrid": Tiny(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {**_LOCAL, **_MAMBA, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
    ),
    "phimoe": Tiny("PhimoeForCausalLM", "PhimoeConfig", _LOCAL),
    "flex_olmo": Tiny("FlexOlmoForCausalLM", "FlexOlmoConfig", {**LLAMA, "num_experts": 8, "num_experts_per_tok": 2}),
    "deepseek_v3": Tiny("DeepseekV3ForCausalLM", "DeepseekV3Config", {**_MOE, **_DEEPSEEK}),
}
DBRX = Tiny(
    "DbrxForCausalLM",
    "DbrxConfig",
    {
        "vocab_size": VOCABULARY,
        "d_model": 128,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 128},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
)
# vLLM cannot read these in int8 as files have them, so they stay floats: docs/limits.md says why.
IN_FLOATS = {
    "gpt_oss": Tiny("GptOssForCausalLM", "GptOssConfig", _LOCAL),
}
# What vLLM's CPU build only loads: it lacks `selective_scan_fwd` of Mamba's first version, routes by sigmoid only in
# groups, and makes of PhiMoE's floats something else than transformers.
ONLY_LOADED = ("jamba", "minimax_m2", "phimoe")
# The class that the published checkpoints name, where it is not that of transformers.
PUBLISHED = {"phimoe": "PhiMoEForCausalLM"}
# vLLM's CPU build has linear attention in bfloat16 only.
IN_BFLOAT16 = ("qwen3_next",)
# vLLM's CPU build answers otherwise than transformers here, in floats too.
OTHERWISE = ("lfm2_moe", "deepseek_v3")
# Families whose experts and router have other names in the file when transformers saves what it has in memory.
FUSED = ("mixtral", "minimax_m2", "lfm2_moe", "qwen3_moe", "phimoe")


@dataclass(frozen=True)
class Case:
    """What vLLM makes of a model and of our output, the parameters of its int8 experts, and our files."""

    name: str
    floats: Opened
    found: Opened
    experts: dict[str, Tensor]
    output: Path

    def check_that_only_routers_stay_floats(self) -> None:
        """Beside them, vLLM has convolutions as linear layers, and Mamba's first version in floats only."""
        linears = {name for name, kind in self.floats.layers.items() if kind == FLOAT}
        int8 = {name for name, kind in self.found.layers.items() if kind == INT8}
        assert int8
        assert int8 < linears
        assert [name for name in sorted(linears - int8) if not STAYS.search(name)] == []

    def check_answers(self, *, by_torch: bool) -> None:
        lost = relative_error(self.found.logprobs, self.floats.logprobs)
        print(f"{self.name}: {lost} from floats")
        assert lost.median < (2 * LOST if self.name in IN_BFLOAT16 else LOST)
        if by_torch:
            error = relative_error(self.found.logprobs, in_torch(self.output))
            print(f"{self.name}: {error} from torch")
            assert error.median < SAME


def opened(name: str, tiny: Tiny, directory: Path, vllm: Vllm, *, fused: bool = False) -> Case:
    """A fused save is compared with the save under published names, which vLLM reads."""
    if not is_known(tiny):
        pytest.skip(f"this transformers has no {tiny.model}")
    source = saved(tiny, directory / "source")
    output = converted(saved(tiny, directory / "fused", fused=True) if fused else source, directory / "int8")
    if name in PUBLISHED:
        for place in (source, output):
            config = read_json(place / "config.json") | {"architectures": [PUBLISHED[name]]}
            (place / "config.json").write_text(json.dumps(config))
    sequences = () if name in ONLY_LOADED else SEQUENCES
    dtype = "bfloat16" if name in IN_BFLOAT16 else "float32"
    experts = directory / "experts.safetensors"
    floats = vllm.open(source, sequences, dtype=dtype)
    found = vllm.open(output, sequences, dtype=dtype, experts=experts)
    return Case(name, floats, found, load_file(experts), output)


@pytest.mark.parametrize("family", [*FAMILIES, *(f"{name}-fused" for name in FUSED)])
def test_vllm_loads_every_int8_expert_into_its_place(family: str, vllm: Vllm, tmp_path: Path) -> None:
    name, _, fused = family.partition("-")
    case = opened(name, FAMILIES[name], tmp_path, vllm, fused=bool(fused))
    assert EXPERTS in case.found.layers.values()
    assert FLOAT_EXPERTS not in case.found.layers.values()
    case.check_that_only_routers_stay_floats()
    expected = dict(registered(read_all(case.output)))
    assert {f"{layer(key)}.{key.rpartition('.')[2]}" for key in case.experts} == expected.keys()
    for key, tensor in case.experts.items():
        ours = expected[f"{layer(key)}.{key.rpartition('.')[2]}"]
        assert (tensor.dtype, tensor.shape) == (ours.dtype, ours.shape), key
        assert torch.equal(tensor, ours), key
    if name not in ONLY_LOADED:
        case.check_answers(by_torch=name not in {*OTHERWISE, *IN_BFLOAT16})


@pytest.mark.parametrize("family", IN_FLOATS)
def test_experts_that_stay_floats_are_not_read_into_int8(family: str, vllm: Vllm, tmp_path: Path) -> None:
    case = opened(family, IN_FLOATS[family], tmp_path, vllm)
    assert FLOAT_EXPERTS in case.found.layers.values()
    assert EXPERTS not in case.found.layers.values()
    case.check_that_only_routers_stay_floats()
    case.check_answers(by_torch=True)


def test_vllm_opens_no_dbrx_at_all(vllm: Vllm, tmp_path: Path) -> None:
    """Its loader and its experts call them differently. Once this fails, DBRX belongs to `IN_FLOATS`."""
    with pytest.raises(RuntimeError, match=r"KeyError: 'blocks\.0\.ffn\.experts\.w13_weight'"):
        vllm.open(saved(DBRX, tmp_path / "source"), ())


def layer(name: str) -> str:
    found = re.search(r"layers\.(\d+)\.", name)
    assert found is not None
    return found[1]


def registered(written: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The parameters that our tensors should become, as `CompressedTensorsW8A8Int8MoEMethod.create_weights` has them.

    By layer and name: w13_weight int8 (experts, 2 x width, hidden), gate before up, w2_weight int8 (experts, hidden,
    width), and float32 scales with a last dimension of 1.
    """
    parts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in written.items():
        found = re.search(r"experts\.(\d+)\.(\w+)\.weight(_scale)?$", name)
        if found is not None:
            role = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.get(found[2], found[2])
            parts.setdefault(f"{layer(name)}.{found[3] or ''}", {})[int(found[1]), role] = tensor
    for key, tensors in parts.items():
        number, _, suffix = key.partition(".")
        count = len(tensors) // 3
        gate_up = [torch.cat([tensors[expert, "w1"], tensors[expert, "w3"]]) for expert in range(count)]
        yield f"{number}.w13_weight{suffix}", torch.stack(gate_up)
        yield f"{number}.w2_weight{suffix}", torch.stack([tensors[expert, "w2"] for expert in range(count)])
