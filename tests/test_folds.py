"""Folds of real architectures: found, proved, and exact in the whole model; left alone where they would not be."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration_models import make_model, save_tokenizer, some_text
from support.checkpoints import Tiny, build_tiny
from support.smoothing import smoothed_copy, smoothed_statistics, spread
from support.verifying import verified
from torch import Tensor, nn

from int8cli import ConvertOptions, convert
from int8cli.checkpoint.locate import opened_source
from int8cli.model.folds import same_bits
from int8cli.model.sampling import Sampling
from int8cli.model.sites import SiteFinder
from int8cli.outliers.calibrate import CalibrateOptions, calibrate
from int8cli.outliers.statistics_file import load_statistics, save_statistics
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.survey import survey_source
from int8cli.progress import SILENT

# The kinds of sites that a block of each architecture can have smoothed, and what divides the input of each.
NORM, VALUES, SECOND = "norm-fed", "attention output", "second feed-forward"
FOLDS = {
    "llama": {NORM, VALUES, SECOND},  # RMSNorm, grouped values, up_proj
    "mistral": {NORM, VALUES, SECOND},
    "llama-biased": {NORM, VALUES, SECOND},  # with biases everywhere
    "phi3": {NORM, VALUES, SECOND},  # queries, keys and values in one linear, gate and up in another
    "opt": {NORM, VALUES, SECOND},  # LayerNorm with bias, ReLU
    "bloom": {NORM, VALUES},  # fused by head; GELU is not homogeneous
    "gpt_neox": {NORM, VALUES},  # parallel attention, two norms
    "gpt2": {NORM, VALUES},  # Conv1D
    "gptj": {NORM, VALUES},  # one norm feeds attention and feed-forward
    "falcon": {NORM, VALUES},  # one key and value for all heads
    "mixtral": {NORM, VALUES},  # experts are no linears
    "gemma2": {VALUES, SECOND},  # a gain of 1 + w cannot take the division
}


def logits(directory: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    ids = torch.randint(4, 90, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("architecture", FOLDS)
def test_folds_are_found_and_the_smoothed_model_computes_the_same_bits(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture, tmp_path / "model", spread)
    statistics = smoothed_statistics(model)
    smoothed = {site.kind for site in statistics.sites if site.smoothing is not None}
    assert smoothed == FOLDS[architecture]
    smoothed_copy(model, tmp_path / "smoothed", statistics, architecture == "gpt2")
    before, after = logits(model), logits(tmp_path / "smoothed")
    assert torch.equal(before, after)
    assert float(before.float().std()) > 0.01


def test_float16_is_smoothed_exactly_too(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", spread, dtype=torch.float16)
    statistics = smoothed_statistics(model)
    assert any(site.smoothing is not None for site in statistics.sites)
    smoothed_copy(model, tmp_path / "smoothed", statistics, False)
    assert torch.equal(logits(model), logits(tmp_path / "smoothed"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_the_checkpoint_has_in_float16_stays_exact_there(dtype: str, words: Path, tmp_path: Path) -> None:
    """The model runs in a dtype with a wider range, and a conversion scales the tensors of the file."""

    def near_the_end(model: Any) -> None:
        spread(model)
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and name.endswith("bias"):
                weight *= 1e-5

    model = make_model("llama-biased", tmp_path / "model", near_the_end, dtype=torch.float16)
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": dtype, "torch_dtype": dtype}))
    how = ConvertOptions(layout="compressed-tensors", smooth="exact", text=words, tokens=48)
    report = convert(model, tmp_path / "out", how).report
    assert report.smoothing is not None
    assert report.smoothing.smoothed > 0
    assert verified(tmp_path / "out", model).passed


def test_statistics_with_smoothing_survive_their_file(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", spread)
    statistics = smoothed_statistics(model, stored_columns=2)
    save_statistics(statistics, tmp_path / "statistics.safetensors")
    found = load_statistics(tmp_path / "statistics.safetensors")
    for before, after in zip(statistics.sites, found.sites, strict=True):
        assert (before.smoothing is None) == (after.smoothing is None)
        assert before.not_smoothed == after.not_smoothed
        for one, other in zip(before.linears, after.linears, strict=True):
            assert (one.smoothed is None) == (other.smoothed is None) == (before.smoothing is None)
            if one.smoothed is not None and other.smoothed is not None:
                assert torch.equal(one.smoothed.weight_error, other.smoothed.weight_error)
                assert replace(one.smoothed, weight_error=other.smoothed.weight_error) == other.smoothed
        if before.smoothing is not None and after.smoothing is not None:
            assert torch.equal(before.smoothing.exponents, after.smoothing.exponents)
            assert [scaled.tensor for scaled in before.smoothing.scaled] == [
                scaled.tensor for scaled in after.smoothing.scaled
            ]


def test_a_calibration_that_smooths_finds_the_same_figures(tmp_path: Path) -> None:
    """The weights are as they were after the proofs: what the model computes afterwards does not change."""
    model = make_model("llama", tmp_path / "model", spread)
    with opened_source(str(model), revision=None, download_dir=model / "incoming") as source:
        survey = survey_source(source, PlanOptions())
        plain = calibrate(source, survey, some_text(), CalibrateOptions(Sampling(48, 16, 0)), SILENT)
    smoothed = smoothed_statistics(model)
    for one, other in zip(plain.sites, smoothed.sites, strict=True):
        assert torch.equal(one.inputs.mean_square, other.inputs.mean_square)
        assert [linear.output_mean_square for linear in one.linears] == [
            linear.output_mean_square for linear in other.linears
        ]


@pytest.mark.parametrize(("limit", "expected"), [(None, {VALUES, SECOND}), (1e4, set[str]())])
def test_where_values_are_limited_no_rows_divide(limit: float | None, expected: set[str], tmp_path: Path) -> None:
    """The limit is far above all values, so that no run reaches it. OLMo's norms have no gain."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4}
    model = build_tiny(Tiny("OlmoForCausalLM", "OlmoConfig", {**sizes, "num_hidden_layers": 2, "clip_qkv": limit}))
    with torch.no_grad():
        spread(model)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    statistics = smoothed_statistics(tmp_path)
    assert {site.kind for site in statistics.sites if site.smoothing is not None} == expected


LONGFORMER = Tiny(
    "LongformerForMaskedLM",
    "LongformerConfig",
    {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "attention_window": 8,
        "pad_token_id": 0,
    },
)
SHARED_LATENTS = Tiny(
    "MistralLarge4ForConditionalGeneration",
    "MistralLarge4Config",
    {
        "text_config": {
            "model_type": "mistral_large4_text",
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "no_rope_layers": [1, 1],
            "kv_source_layers": [0, 0],
            "pad_token_id": 0,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "head_dim": 16,
        },
    },
)


def saved(tiny: Tiny, directory: Path) -> Path:
    model = build_tiny(tiny)
    with torch.no_grad():
        spread(model)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def test_weights_that_run_for_other_inputs_only_leave_their_module_alone(tmp_path: Path) -> None:
    model = saved(LONGFORMER, tmp_path / "model")  # value_global makes the output's input for tokens with a global mask
    statistics = smoothed_statistics(model)
    of_blocks = [site for site in statistics.sites if site.linears and site.layer is not None]
    assert {site.kind for site in of_blocks} >= {NORM, VALUES}
    assert not any(site.smoothing for site in of_blocks if site.kind == VALUES)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.named = nn.ModuleDict({f"expert_{place}": nn.Linear(4, 4) for place in range(3)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.named["expert_2"](self.experts[1](self.linear1(x)))
        return y


def test_an_expert_that_ran_stands_for_all_but_no_layer_for_one_of_another_name() -> None:
    module, finder, x = Branches(), SiteFinder(), torch.ones(2, 4)
    with torch.no_grad(), finder.watching(module, [], x):
        module(x)
    assert list(finder.unused(module)) == ["linear2.weight", "linear2.bias"]


def test_what_a_block_writes_for_later_blocks_must_stay_too(tmp_path: Path) -> None:
    import transformers

    if not hasattr(transformers, SHARED_LATENTS.config):
        pytest.skip(f"transformers {transformers.__version__} has no model whose blocks share what a norm made")
    model = saved(SHARED_LATENTS, tmp_path / "model")
    statistics = smoothed_statistics(model)
    made = {site.linears[0].name: site.smoothing for site in statistics.sites if site.linears}
    latents = {name: smoothing for name, smoothing in made.items() if name.endswith(("kv_b_proj", "wkv_b"))}
    assert len(latents) == 2
    assert set(latents.values()) == {None}
    assert any(made.values())
    smoothed_copy(model, tmp_path / "smoothed", statistics, False)
    loader = getattr(transformers, SHARED_LATENTS.model)
    ids = torch.randint(4, 90, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before, after = (
            loader.from_pretrained(directory, dtype="auto").eval()(ids).logits
            for directory in (model, tmp_path / "smoothed")
        )
    assert torch.equal(before, after)


def test_same_bits_tells_zeros_apart_and_knows_nan() -> None:
    nan, zeros = torch.tensor([float("nan"), 1.0]), torch.zeros(2)
    assert same_bits(nan, nan.clone())
    assert not same_bits(zeros, -zeros)
    assert not same_bits(zeros, zeros.half())
    assert not same_bits(zeros, torch.zeros(3))
