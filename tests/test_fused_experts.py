"""Experts that the source stores fused, in the compressed-tensors layout: split into the matrices that vLLM reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import Tiny, build_tiny, is_known, read_all, read_json, read_tensors, save_by_hand
from support.program import run, tree
from support.verifying import verified
from torch import Tensor

from int8cli import ConvertOptions, convert
from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.errors import NonFiniteError
from int8cli.loaders.transformers_versions import release
from int8cli.planning import survey as survey_module
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.expert_names import names_when_split
from int8cli.planning.layouts import LAYOUTS, compressed_tensors
from int8cli.planning.survey import survey_source

OPTIONS = ConvertOptions(outliers="none", layout="compressed-tensors")
EXPERTS, HIDDEN, WIDTH = 3, 40, 24
ATTENTION = "model.layers.0.self_attn.o_proj.weight"
# Model type → the module of the experts in vLLM, and the names of the two tensors in the source.
PLAIN = "model.layers.0.mlp.experts"
FAMILIES = {
    "qwen3_moe": (PLAIN, f"{PLAIN}.gate_up_proj", f"{PLAIN}.down_proj"),
    "qwen3_5_moe": (PLAIN, f"{PLAIN}.gate_up_proj", f"{PLAIN}.down_proj"),
    "llama4_text": (
        "model.layers.0.feed_forward.experts",
        "model.layers.0.feed_forward.experts.gate_up_proj",
        "model.layers.0.feed_forward.experts.down_proj",
    ),
    "granitemoe": (
        "model.layers.0.block_sparse_moe.experts",
        "model.layers.0.block_sparse_moe.input_linear.weight",
        "model.layers.0.block_sparse_moe.output_linear.weight",
    ),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


def matrices(family: str, width: int = WIDTH, hidden: int = HIDDEN) -> dict[str, Tensor]:
    """The experts one by one, as vLLM names them."""
    module = FAMILIES[family][0]
    found = {}
    for expert in range(EXPERTS):
        for seed, (name, shape) in enumerate(
            {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}.items()
        ):
            found[f"{module}.{expert}.{name}.weight"] = normal(*shape, seed=10 * expert + seed)
    return found


def fused(family: str, parts: dict[str, Tensor], *, transposed: bool) -> dict[str, Tensor]:
    module, gate_up, down = FAMILIES[family]

    def stacked(*names: str) -> Tensor:
        each = [torch.cat([parts[f"{module}.{expert}.{name}.weight"] for name in names]) for expert in range(EXPERTS)]
        return torch.stack([matrix.t() if transposed else matrix for matrix in each]).contiguous()

    return {gate_up: stacked("gate_proj", "up_proj"), down: stacked("down_proj")}


def source_of(directory: Path, family: str, tensors: dict[str, Tensor]) -> Path:
    beside = {ATTENTION: normal(HIDDEN, HIDDEN), "model.embed_tokens.weight": normal(9, HIDDEN)}
    return save_by_hand(directory, beside | tensors, {"model_type": family, "num_hidden_layers": 1})


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("family", FAMILIES)
def test_split_experts_are_what_separate_ones_become(family: str, transposed: bool, tmp_path: Path) -> None:
    parts = matrices(family)
    source = source_of(tmp_path / "fused", family, fused(family, parts, transposed=transposed))
    separate = source_of(tmp_path / "separate", family, parts)
    report = convert(source, tmp_path / "out", OPTIONS).report
    convert(separate, tmp_path / "expected", OPTIONS)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "expected" / "model.safetensors"
    ).read_bytes()
    assert len(report.layers) == 3 * EXPERTS + 1
    verification = verified(tmp_path / "out", source)
    assert {check.status for check in verification.checks if check.name != "loads"} == {"passed"}


def test_blocks_that_cross_tiles_and_rows_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from int8cli.conversion import buffers
    from int8cli.planning import blocks

    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 7 * HIDDEN + 3)
    monkeypatch.setattr(buffers, "TILE_BYTES", 2 * 11 * HIDDEN)
    parts = matrices("llama4_text")
    convert(
        source_of(tmp_path / "s", "llama4_text", fused("llama4_text", parts, transposed=True)), tmp_path / "o", OPTIONS
    )
    convert(source_of(tmp_path / "t", "llama4_text", parts), tmp_path / "p", OPTIONS)
    assert (tmp_path / "o" / "model.safetensors").read_bytes() == (tmp_path / "p" / "model.safetensors").read_bytes()


def test_names_shapes_and_scales_are_those_that_vllm_registers(tmp_path: Path) -> None:
    """Of `CompressedTensorsW8A8Int8MoEMethod.create_weights` (0.32), by expert: w13 has gate and up, w2 has down."""
    family = "qwen3_5_moe"
    source = source_of(tmp_path / "s", family, fused(family, matrices(family), transposed=False))
    convert(source, tmp_path / "out", OPTIONS)
    written = read_tensors(tmp_path / "out" / "model.safetensors")
    for expert in range(EXPERTS):
        for name, rows, columns in (
            ("gate_proj", WIDTH, HIDDEN),
            ("up_proj", WIDTH, HIDDEN),
            ("down_proj", HIDDEN, WIDTH),
        ):
            weight, scale = (written[f"{PLAIN}.{expert}.{name}.weight{end}"] for end in ("", "_scale"))
            assert (weight.dtype, tuple(weight.shape)) == (torch.int8, (rows, columns))
            assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (rows, 1))
    entries = read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"]
    assert not [e for e in entries if compressed_tensors.leaves_alone(e, f"{PLAIN}.0.gate_proj")]


def test_the_other_layout_leaves_them_as_they_are(tmp_path: Path) -> None:
    family = "llama4_text"
    tensors = fused(family, matrices(family), transposed=True)
    convert(source_of(tmp_path / "s", family, tensors), tmp_path / "out", ConvertOptions(outliers="none"))
    written = read_tensors(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


UNKNOWN: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "interleaved": ("gpt_oss", {"gate_up_proj": (3, 40, 48), "down_proj": (3, 24, 40)}),
    "unknown family": ("novel", {"gate_up_proj": (3, 48, 40), "down_proj": (3, 40, 24)}),
    "no down_proj": ("qwen3_moe", {"gate_up_proj": (3, 48, 40)}),
    "shapes that do not fit": ("qwen3_moe", {"gate_up_proj": (3, 48, 40), "down_proj": (3, 40, 40)}),
    "other counts": ("qwen3_moe", {"gate_up_proj": (3, 48, 40), "down_proj": (2, 40, 24)}),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_understood_stays_fused_and_is_ignored(case: str, tmp_path: Path) -> None:
    family, shapes = UNKNOWN[case]
    tensors = {f"{PLAIN}.{name}": normal(*shape) for name, shape in shapes.items()}
    convert(source_of(tmp_path / "s", family, tensors), tmp_path / "out", OPTIONS)
    written = read_tensors(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    entries = read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"]
    assert compressed_tensors.FUSED_EXPERTS_ENTRY in entries


@pytest.mark.parametrize("pattern", ["*.experts", "*.experts.*", "*.experts.1.up_proj", "*.gate_up_proj"])
def test_a_layer_of_which_an_expert_is_skipped_stays_fused(pattern: str, tmp_path: Path) -> None:
    family = "qwen3_moe"
    tensors = fused(family, matrices(family), transposed=False)
    source = source_of(tmp_path / "s", family, tensors)
    convert(source, tmp_path / "out", ConvertOptions(outliers="none", layout="compressed-tensors", skip=(pattern,)))
    written = read_tensors(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert written[ATTENTION].dtype == torch.int8
    unmatched = read_json(tmp_path / "out" / "int8" / "report.json")["unmatched_patterns"]
    assert unmatched == ([] if ".1." not in pattern else [pattern])


def test_threads_and_processes_change_no_byte(tmp_path: Path) -> None:
    family = "llama4_text"
    source = source_of(tmp_path / "s", family, fused(family, matrices(family), transposed=True))
    convert(source, tmp_path / "one", ConvertOptions(outliers="none", layout="compressed-tensors", threads=1))
    convert(source, tmp_path / "many", ConvertOptions(outliers="none", layout="compressed-tensors", threads=3))
    assert tree(tmp_path / "one") == tree(tmp_path / "many")


def test_a_nan_is_found_and_named_by_its_expert(tmp_path: Path) -> None:
    family = "llama4_text"
    parts = matrices(family)
    parts[f"{FAMILIES[family][0]}.1.up_proj.weight"][5, 7] = float("nan")
    source = source_of(tmp_path / "s", family, fused(family, parts, transposed=True))
    with pytest.raises(NonFiniteError, match=r"experts\.1\.up_proj\.weight contains nan at row 5, column 7"):
        convert(source, tmp_path / "out", OPTIONS)


def test_a_part_is_read_by_its_name(tmp_path: Path) -> None:
    for family, transposed in (("llama4_text", True), ("granitemoe", False)):
        parts = matrices(family)
        source = DirectorySource(source_of(tmp_path / family, family, fused(family, parts, transposed=transposed)))
        survey = survey_source(source, PlanOptions(), LAYOUTS["compressed-tensors"])
        with CheckpointTensors(source, survey.shards) as tensors:
            for name, expected in parts.items():
                assert torch.equal(tensors.read(name), expected)
                assert torch.equal(tensors.map(name), expected)
                assert torch.equal(torch.cat([block.clone() for block in tensors.row_blocks(name, 100)]), expected)


def test_output_of_a_version_that_left_them_fused_is_verified_as_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = "llama4_text"
    source = source_of(tmp_path / "s", family, fused(family, matrices(family), transposed=True))
    with monkeypatch.context() as earlier:
        earlier.setattr(survey_module, "split_experts", lambda shards, config, options: tuple(shards))
        convert(source, tmp_path / "out", OPTIONS)
    assert {check.status for check in verified(tmp_path / "out", source).checks if check.name != "loads"} == {"passed"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_are_predicted_exactly(layout: str, tmp_path: Path) -> None:
    family = "qwen3_5_moe"
    source_of(tmp_path / "s", family, fused(family, matrices(family), transposed=False))
    outcome = run("convert", "s", "--output", "out", "--layout", layout, "--dry-run", "--json", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    report = convert(tmp_path / "s", tmp_path / "out", ConvertOptions(outliers="none", layout=layout)).report  # type: ignore[arg-type]
    assert json.loads(outcome.out)["output_bytes"] == report.output_bytes


TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "granitemoe": Tiny("GraniteMoeForCausalLM", "GraniteMoeConfig", TINY),
    "llama4_text": Tiny("Llama4ForCausalLM", "Llama4TextConfig", {**TINY, "head_dim": 8, "intermediate_size_mlp": 24}),
}


_EXPERTS = {**TINY, "num_experts": 4}
# Families that transformers saves under their published names, or fused under its own.
RENAMED = {
    "mixtral": Tiny("MixtralForCausalLM", "MixtralConfig", {**TINY, "head_dim": 8}),
    "minimax_m2": Tiny("MiniMaxM2ForCausalLM", "MiniMaxM2Config", {**TINY, "head_dim": 8}),
    "phimoe": Tiny("PhimoeForCausalLM", "PhimoeConfig", TINY),
    "lfm2_moe": Tiny(
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {**_EXPERTS, "moe_intermediate_size": 24, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "ernie4_5_moe": Tiny(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {**TINY, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    ),
    "olmoe": Tiny("OlmoeForCausalLM", "OlmoeConfig", _EXPERTS),
    "jamba": Tiny(
        "JambaForCausalLM",
        "JambaConfig",
        {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0, "mamba_d_state": 4},
    ),
}


@pytest.mark.parametrize("family", RENAMED)
def test_fused_saves_become_what_saves_under_published_names_become(family: str, tmp_path: Path) -> None:
    """By transformers' own saves in both forms: the names of experts, and of the router beside them."""
    if not is_known(RENAMED[family]):
        pytest.skip(f"this transformers has no {family}")
    model = build_tiny(RENAMED[family])
    model.save_pretrained(tmp_path / "published")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    if not [name for name, tensor in read_all(tmp_path / "fused").items() if "experts" in name and tensor.ndim == 3]:
        pytest.skip("this transformers does not save fused experts")
    names = names_when_split([family])
    assert names is not None
    if any(names.renamed(name) != name for name in read_all(tmp_path / "published")):
        pytest.skip("this transformers does not know the published names")
    convert(tmp_path / "published", tmp_path / "expected", OPTIONS)
    convert(tmp_path / "fused", tmp_path / "out", OPTIONS)
    written, expected = read_all(tmp_path / "out"), read_all(tmp_path / "expected")
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    ours, theirs = (read_json(tmp_path / out / "config.json")["quantization_config"] for out in ("out", "expected"))
    assert ours == theirs
    verification = verified(tmp_path / "out", tmp_path / "fused")
    assert {check.status for check in verification.checks if check.name != "loads"} == {"passed"}


def test_the_router_keeps_its_name_where_the_experts_stay_fused(tmp_path: Path) -> None:
    experts = "model.layers.{}.mlp.experts"
    tensors = {
        f"{experts.format(layer)}.{name}": normal(*shape)
        for layer in (0, 1)
        for name, shape in (("gate_up_proj", (3, 48, 40)), ("down_proj", (3, 40, 24)))
    } | {f"model.layers.{layer}.mlp.gate.weight": normal(3, 40) for layer in (0, 1)}
    source = source_of(tmp_path / "s", "mixtral", tensors)
    options = ConvertOptions(outliers="none", layout="compressed-tensors", skip=("*.0.mlp.experts",))
    convert(source, tmp_path / "out", options)
    written = read_tensors(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["model.layers.0.mlp.gate.weight"], tensors["model.layers.0.mlp.gate.weight"])
    assert "model.layers.0.mlp.experts.gate_up_proj" in written
    assert "model.layers.1.block_sparse_moe.gate.weight" in written
    assert written["model.layers.1.block_sparse_moe.experts.2.w3.weight"].dtype == torch.int8
    assert not [name for name in written if name.startswith("model.layers.1.mlp")]


@pytest.mark.parametrize("family", MODELS)
def test_every_expert_of_a_saved_model_becomes_int8(family: str, tmp_path: Path) -> None:
    """By the model's own state dict: gate first, then up, in the order that its class uses."""
    if family == "granitemoe" and release(transformers.__version__) < release("5.23.0"):
        pytest.skip("transformers 5.0.0 names the experts of GraniteMoe as its checkpoints do")
    model = build_tiny(MODELS[family])
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", OPTIONS)
    written = read_all(tmp_path / "out")
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim == 3}
    assert state
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        down = kind.startswith("down")
        for expert, matrix in enumerate(tensor):
            oriented = matrix.t() if family == "llama4_text" else matrix
            halves = [oriented] if down else oriented.chunk(2)
            for leaf, half in zip(["down_proj"] if down else ["gate_proj", "up_proj"], halves, strict=True):
                data, scale = (written[f"{module}.{expert}.{leaf}.weight{end}"] for end in ("", "_scale"))
                assert data.dtype == torch.int8
                assert float((data * scale - half.float()).abs().max()) <= float(scale.max()) * 0.51
