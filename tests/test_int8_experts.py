"""load_model on mixtures of experts: fused experts of transformers, computed in int8 by expert."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import LISTED, Tiny, build_tiny, convert_storing, read_all, stored_at
from test_fused_experts import MODELS, RENAMED

from int8cli import ConvertOptions, convert, load_model
from int8cli.errors import CheckpointError, UnsupportedModelError
from int8cli.loaders.transformers_versions import release
from int8cli.runtime.experts import INSIDE
from int8cli.runtime.linear import Int8Linear

pytestmark = pytest.mark.skipif(
    release(transformers.__version__) < release("5.23.0"),
    reason="transformers 5.0.0 has other classes of experts, which load_model refuses",
)

OPTIONS = ConvertOptions(outliers="none", layout="compressed-tensors")
_OMNI_TEXT = {
    **LISTED["qwen3_moe"].arguments,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
_OMNI = {
    "text_config": _OMNI_TEXT,
    "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 37, "num_heads": 2, "out_hidden_size": 32},
    "audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 37},
}
FAMILIES = {
    "mixtral": LISTED["mixtral"],
    "qwen3_moe": LISTED["qwen3_moe"],
    "granitemoe": MODELS["granitemoe"],
    "llama4_text": MODELS["llama4_text"],
    "phimoe": RENAMED["phimoe"],  # whose router is renamed on load, with all that has its name
    # The module around its experts initializes them.
    "qwen3_omni_moe": Tiny("Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3OmniMoeThinkerConfig", _OMNI),
}
IDS = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(1))


def made(family: str, directory: Path) -> tuple[Any, Any]:
    """The 16-bit model, in float32, and the conversion of it as load_model has it."""
    model = build_tiny(FAMILIES[family], torch.float32)
    model.save_pretrained(directory / "source")
    convert(directory / "source", directory / "out", OPTIONS)
    return model, load_model(directory / "out", device="cpu")


def experts_modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, INSIDE)]


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_run_in_int8_near_the_float_model(family: str, tmp_path: Path) -> None:
    reference, model = made(family, tmp_path)
    written = read_all(tmp_path / "out")
    int8 = sum(1 for tensor in written.values() if tensor.dtype == torch.int8)
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == int8 > 0
    assert len(experts_modules(model)) == model.config.get_text_config().num_hidden_layers
    with torch.no_grad():
        found, exact = model(IDS).logits, reference(IDS).logits
    assert 1e-6 < relative_error(found, exact) < (0.05 if family == "phimoe" else 0.03)


def test_experts_run_where_transformers_knows_no_norm_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in transformers 5.19."""
    _, model = made("mixtral", tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
        for module in experts_modules(model):
            for owner in (module, type(module)):
                monkeypatch.delattr(owner, "has_post_expert_norm", raising=False)
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama4_text"}))
def test_each_token_gets_the_sum_of_its_experts_as_one_token_alone_does(family: str, tmp_path: Path) -> None:
    """By the definition, token by token and choice by choice, with the same int8 layers."""
    _, model = made(family, tmp_path)
    module = experts_modules(model)[0]
    experts = getattr(module, INSIDE)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(9, experts[0].gate.in_features, generator=generator)
    index = torch.stack([torch.randperm(len(experts), generator=generator)[:2] for _ in range(9)])
    index[4] = index[3]
    weights = torch.rand(9, 2, generator=generator)
    with torch.no_grad():
        found = module(hidden, index, weights)
        for token in range(9):
            expected = torch.zeros(hidden.shape[1], dtype=torch.float64)
            for choice in range(2):
                expert, row = experts[int(index[token, choice])], hidden[token : token + 1]
                gated = module.act_fn(expert.gate(row)) * expert.up(row)
                expected += (expert.down(gated)[0] * weights[token, choice]).double()
            assert torch.allclose(found[token].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantized_it_is_transformers_own_model(family: str, tmp_path: Path) -> None:
    reference, model = made(family, tmp_path)
    with torch.no_grad():
        exact = reference(IDS).logits
        floats = model.dequantize()
        assert not experts_modules(floats)
        assert {name for name, _ in floats.named_parameters()} == {name for name, _ in reference.named_parameters()}
        assert 1e-6 < relative_error(floats(IDS).logits, exact) < 0.03


def test_stored_columns_of_experts_are_exact(tmp_path: Path) -> None:
    build_tiny(LISTED["mixtral"], torch.float32).save_pretrained(tmp_path / "source")
    convert_storing(tmp_path / "source", tmp_path / "out", lambda decision: stored_at(decision, 1, 3), OPTIONS)
    model = load_model(tmp_path / "out", device="cpu")
    source = read_all(tmp_path / "source")
    expert = getattr(experts_modules(model)[0], INSIDE)[1]
    name = next(name for name in sorted(source) if name.endswith("experts.1.w1.weight"))
    assert expert.gate.outlier_cols.tolist() == [1, 3]
    assert torch.equal(expert.gate.dequantize()[:, [1, 3]], source[name][:, [1, 3]])


@pytest.mark.parametrize("tokens", [1, 2, 11, 22, 33, 200])
def test_the_output_of_a_layer_is_contiguous_like_that_of_a_float_layer(tokens: int) -> None:
    layer = Int8Linear(32, 24, None, inputs="zeropoint")
    layer.weight.random_(-127, 128)
    layer.row_absmax.fill_(1.0)
    layer.prepare()
    with torch.no_grad():
        assert layer(torch.randn(1, tokens, 32)).is_contiguous()


def test_a_model_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    made("granitemoe", tmp_path)
    tensors = read_all(tmp_path / "out")
    lost = {name: tensor for name, tensor in tensors.items() if ".experts.3." not in name}
    assert len(lost) < len(tensors)
    save_file(lost, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="expert 3 is missing"):
        load_model(tmp_path / "out", device="cpu")


def test_experts_that_transformers_does_not_hand_over_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeExperts

    made("granitemoe", tmp_path)
    monkeypatch.delattr(GraniteMoeExperts, "_apply_gate")
    with pytest.raises(UnsupportedModelError, match="GraniteMoeExperts cannot be computed in int8"):
        load_model(tmp_path / "out", device="cpu")


def test_llama4_experts_compute_only_the_tokens_that_chose_them(tmp_path: Path) -> None:
    """The router of Llama 4 hands zeros to the other experts: their rows stay zero, and the others are unchanged."""
    _, model = made("llama4_text", tmp_path)
    module = experts_modules(model)[0]
    experts = getattr(module, INSIDE)
    hidden = torch.randn(len(experts), 5, module.hidden_size, generator=torch.Generator().manual_seed(3))
    hidden[1, 2] = 0
    with torch.no_grad():
        found = module(hidden.view(-1, module.hidden_size)).view_as(hidden)
        for number, expert in enumerate(experts):
            rows = hidden[number]
            expected = expert.down(expert.up(rows) * module.act_fn(expert.gate(rows)))
            assert torch.allclose(found[number], expected, rtol=1e-5, atol=1e-7)
    assert not found[1, 2].any()


def test_where_experts_stay_floats_the_class_computes_them(tmp_path: Path) -> None:
    model = build_tiny(LISTED["qwen3_moe"], torch.float32)
    model.save_pretrained(tmp_path / "source")
    options = ConvertOptions(outliers="none", layout="compressed-tensors", skip=("*.layers.1.mlp.experts.*",))
    convert(tmp_path / "source", tmp_path / "out", options)
    loaded = load_model(tmp_path / "out", device="cpu")
    assert len(experts_modules(loaded)) == 1
    with torch.no_grad():
        assert relative_error(loaded(IDS).logits, model(IDS).logits) < 0.03
