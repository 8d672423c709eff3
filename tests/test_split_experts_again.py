"""A conversion that has fused experts one by one: made floats again, and evaluated."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.calibration_models import save_tokenizer, some_text
from support.checkpoints import Tiny, build_tiny, read_all
from support.smoothing import spread
from test_evaluate import evaluated
from test_fused_experts import MODELS, TINY

from int8cli import ConvertOptions, convert, dequantize, load_model
from int8cli.loaders.transformers_versions import release
from int8cli.results.evaluation import REFERENCE

pytestmark = pytest.mark.skipif(
    release(transformers.__version__) < release("5.23.0"),
    reason="transformers 5.0.0 has other classes of experts, which load_model refuses",
)

OPTIONS = ConvertOptions(outliers="none", layout="compressed-tensors")
FAMILIES = {
    **MODELS,
    "qwen3_5_moe_text": Tiny(
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        {
            **TINY,
            "head_dim": 8,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["full_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]},
        },
    ),
}
IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))


def made(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model and its conversion with split experts; both have a tokenizer. Returns the model."""
    model = build_tiny(FAMILIES[family], dtype)
    model.save_pretrained(directory / "source")
    save_tokenizer(directory / "source")
    convert(directory / "source", directory / "out", OPTIONS)
    assert any(".experts.0." in name for name in read_all(directory / "out"))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_opens_the_floats_and_has_the_weights_that_int8_stands_for(family: str, tmp_path: Path) -> None:
    original = made(family, tmp_path)
    dequantize(tmp_path / "out", tmp_path / "floats")
    assert not any(".experts.0." in name for name in read_all(tmp_path / "floats"))
    wanted = load_model(tmp_path / "out", device="cpu").dequantize()
    opened, info = type(original).from_pretrained(tmp_path / "floats", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found = opened.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.state_dict().items())
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, wanted(IDS).logits)


def test_small_blocks_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("granitemoe", "llama4_text"):
        root = tmp_path / family
        made(family, root)
        dequantize(root / "out", root / "whole")
        with monkeypatch.context() as smaller:
            smaller.setattr("int8cli.conversion.float_blocks._BLOCK_ELEMENTS", 100)
            dequantize(root / "out", root / "blocks")
        name = "model.safetensors"
        assert (root / "blocks" / name).read_bytes() == (root / "whole" / name).read_bytes()


def test_a_smoothing_is_undone_beside_fused_experts(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(some_text().text)
    model = build_tiny(FAMILIES["granitemoe"], torch.bfloat16)
    with torch.no_grad():
        spread(model)
    model.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    smooth = replace(OPTIONS, outliers="activations", smooth="auto", text=tmp_path / "text", tokens=48)
    convert(tmp_path / "source", tmp_path / "out", replace(smooth, outlier_columns=2, sequence_length=16))
    written, source = read_all(tmp_path / "out"), read_all(tmp_path / "source")
    changed = [name for name in written if name.endswith((".smooth_exponents", ".smooth_row_exponents"))]
    assert any(".experts.0." in name for name in written)
    assert any(bool(written[name].any()) for name in changed)
    dequantize(tmp_path / "out", tmp_path / "floats")
    found = read_all(tmp_path / "floats")
    assert found.keys() == source.keys()
    for name, tensor in source.items():
        assert found[name].shape == tensor.shape
        if name.endswith("norm.weight"):
            assert torch.equal(found[name], tensor)
        assert (found[name].float() - tensor.float()).norm() <= 0.1 * tensor.float().norm(), name


@pytest.mark.parametrize("family", MODELS)
def test_it_is_evaluated_alone_and_beside_its_source(family: str, tmp_path: Path) -> None:
    made(family, tmp_path, torch.bfloat16)
    alone = evaluated(tmp_path / "out")
    beside = evaluated(tmp_path / "out", reference=tmp_path / "source")
    for found in (alone, beside):
        scores = [method.scores for method in found.methods if method.scores is not None]
        assert scores
        assert all(1.0 < each.perplexity < 1000.0 for each in scores)
    reference = beside.method(REFERENCE)
    assert reference is not None
    assert reference.scores is not None
