"""What checkpoints hold beside the usual: other floats, other names for heads and parts, files below the root."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from packaging.version import Version
from safetensors.torch import save_file
from support.checkpoints import (
    LISTED,
    WITHOUT_COLUMNS,
    Tiny,
    build_tiny,
    read_all,
    read_json,
    save_by_hand,
    save_tiny,
)
from support.verifying import verified
from test_plan import plan_of, spec
from torch import Tensor

from int8cli import ConvertOptions, VerifyOptions, convert, verify
from int8cli.commands.options import LayoutName
from int8cli.errors import UnsupportedModelError
from int8cli.loaders import transformers_versions
from int8cli.loaders.older_names import OlderNames
from int8cli.planning import plan as plan_module
from int8cli.planning import reasons as why
from int8cli.planning.layouts import compressed_tensors
from int8cli.planning.layouts.skip_modules import covers, skip_modules
from int8cli.results.verification import Check

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of its own affairs

DOWN = "model.layers.0.mlp.down_proj"


def llama_with(directory: Path, changed: Mapping[str, Tensor]) -> Path:
    """A tiny Llama in bfloat16 with some tensors replaced or added."""
    save_tiny("llama", directory)
    save_file(read_all(directory) | dict(changed), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def loads(output: Path) -> Check:
    return next(check for check in verify(output).checks if check.name == "loads")


# floats of other widths


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_linear_layer_in_another_float_is_named_and_runs(dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    source = llama_with(tmp_path / "source", {f"{DOWN}.weight": torch.randn(32, 56).mul(0.05).to(dtype)})
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    entries = read_json(tmp_path / "output" / "config.json")["quantization_config"]["llm_int8_skip_modules"]
    assert any(covers(entry, DOWN) for entry in entries)
    assert not any(covers(entry, "model.layers.0.mlp.up_proj") for entry in entries)
    weight = read_all(tmp_path / "output")[f"{DOWN}.weight"]
    assert torch.equal(weight, read_all(source)[f"{DOWN}.weight"].to(torch.bfloat16))
    loader: Any = LlamaForCausalLM
    model = loader.from_pretrained(tmp_path / "output", device_map="cpu")
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2]])).logits.float()).all()
    assert verify(tmp_path / "output", VerifyOptions(source=source)).passed


@pytest.mark.parametrize(
    "dtype", ["uint16", "uint64", "complex64", "float8_e8m0fnu", "float8_e5m2fnuz", "int16", "bool"]
)
def test_a_copied_tensor_of_any_dtype_is_sound(dtype: str, tmp_path: Path) -> None:
    if dtype not in ("int16", "bool") and Version(safetensors.__version__) < Version("0.8"):
        pytest.skip(f"safetensors {safetensors.__version__} does not know {dtype}")
    extra = torch.arange(8).view(torch.uint8)[:16].clone().view(getattr(torch, dtype))
    source = llama_with(tmp_path / "source", {"model.extra": extra})
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    found = verify(tmp_path / "output", VerifyOptions(source=source))
    assert [(check.name, check.failures) for check in found.checks if check.failures] == []


# skip lists


def test_what_is_named_like_an_embedding_and_may_be_linear_is_in_the_list() -> None:
    plan = plan_of(
        spec("patch_embedder.weight", 32, 48),
        spec("quantize.embedding.weight", 64, 32),
        spec("model.embed_tokens.weight", 99, 32),
        spec("fc1.weight", 64, 32),
    )
    entries = skip_modules(plan)
    assert {"patch_embedder", "embedding"} <= set(entries)
    assert not any(covers(entry, "fc1") for entry in entries)
    assert not any(covers(entry, "model.embed_tokens") for entry in entries)


OLDER_PARTS = ("language_model.model.layers.0.self_attn.k_proj", "vision_tower.vision_model.layers.0.self_attn.k_proj")


@pytest.mark.parametrize("layout", [compressed_tensors], ids=["compressed-tensors"])
def test_a_skipped_part_is_left_alone_under_its_name_of_today(layout: Any) -> None:
    plan = plan_of(*(spec(f"{module}.weight", 32, 32) for module in OLDER_PARTS), skip=("language_model.*",))
    for alias in ("model.language_model.layers.0.self_attn.k_proj", OLDER_PARTS[0]):
        assert any(layout.leaves_alone(entry, alias) for entry in layout.ignore(plan))
    for alias in ("model.vision_tower.vision_model.layers.0.self_attn.k_proj", OLDER_PARTS[1]):
        assert not any(layout.leaves_alone(entry, alias) for entry in layout.ignore(plan))


@pytest.mark.parametrize(
    ("module", "beside", "expected"),
    [
        ("language_model.model.layers.0.q_proj", (), {"model.language_model.layers.0.q_proj"}),
        ("language_model.lm_head", (), {"lm_head"}),
        ("visual.blocks.0.attn.qkv", ("model.layers.0.q_proj",), {"model.visual.blocks.0.attn.qkv"}),
        ("model.layers.0.q_proj", ("visual.merger.mlp.0",), {"model.language_model.layers.0.q_proj"}),
        ("model.layers.0.q_proj", (), set()),
        ("vision_model.encoder.layers.0.fc1", ("text_model.encoder.layers.0.fc1",), set()),
    ],
)
def test_names_on_load(module: str, beside: tuple[str, ...], expected: set[str]) -> None:
    assert set(OlderNames((module, *beside)).on_load(module)) == expected


# output heads

BLOCK = ("model.layers.0.attention.wo.weight", 32, 32)


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("language_model.model.tok_embeddings.weight", "language_model.output.weight"),
        ("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"),
        ("model.transformer.wte.embedding", "model.transformer.ff_out.weight"),
        ("layers.0.wte.weight", "layers.3.linear.weight"),
        ("model.embed_tokens.weight", "anything.at.all_proj.weight"),
    ],
)
def test_a_matrix_with_a_row_for_each_token_is_the_output_head(embedding: str, head: str) -> None:
    tensors = (spec(embedding, 96, 32), spec(head, 96, 32), spec(*BLOCK))
    plan = plan_of(*tensors, config={"model_type": "own_code", "llm_config": {"vocab_size": 96}})
    reasons = {decision.spec.name: decision.reason for decision in plan.decisions}
    assert reasons[head] == why.HEAD
    assert reasons[BLOCK[0]] == why.LINEAR


def test_a_head_of_a_padded_vocabulary_is_told_and_a_layer_of_that_width_in_blocks_is_not() -> None:
    layers = [spec(f"layers.{i}.mlp.up_proj.weight", 32064, 64) for i in range(2)]
    tensors = (spec("tok_embeddings.weight", 32064, 64), spec("out_proj.weight", 32064, 64), *layers)
    plan = plan_of(*tensors, config={"model_type": "own_code", "vocab_size": 32001})
    assert [decision.reason for decision in plan.decisions[1:]] == [why.HEAD, why.LINEAR, why.LINEAR]


# a judge that shares no table


IDEFICS = Tiny(
    "IdeficsForVisionText2Text",
    "IdeficsConfig",
    {
        **LISTED["llama"].arguments,
        "additional_vocab_size": 2,
        "cross_layer_interval": 1,
        "vision_config": {
            "embed_dim": 32,
            "image_size": 16,
            "intermediate_size": 37,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "patch_size": 8,
        },
    },
)


@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
def test_the_layers_of_idefics_that_look_at_images_are_int8_and_the_rows_added_to_its_head_are_not(
    layout: LayoutName, tmp_path: Path
) -> None:
    build_tiny(IDEFICS).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "output", ConvertOptions(outliers="none", layout=layout))
    written = read_all(tmp_path / "output")
    for each in ("cross_attn.q_proj", "mlp.down_proj"):
        assert written[f"model.gated_cross_attn_layers.0.{each}.weight"].dtype == torch.int8
    assert written["lm_head.additional_fc.weight"].dtype == torch.bfloat16
    assert verified(tmp_path / "output").passed


def with_router_in_float32(directory: Path) -> Path:
    model = build_tiny(LISTED["deepseek_v3"], torch.float32)
    model.save_pretrained(directory)
    config = read_json(directory / "config.json") | {"dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_verify_finds_what_was_rounded_though_loaders_hold_it_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    if transformers_versions.release(transformers.__version__) < (5, 24):
        pytest.skip("earlier versions hold this router in bfloat16")
    source = with_router_in_float32(tmp_path / "source")
    convert(source, tmp_path / "right", WITHOUT_COLUMNS)
    assert loads(tmp_path / "right").status == "passed"
    monkeypatch.setattr(transformers_versions, "FLOAT32", ())
    convert(source, tmp_path / "wrong", WITHOUT_COLUMNS)
    found = [(failure.tensor, failure.problem) for failure in loads(tmp_path / "wrong").failures]
    assert ("model.layers.1.mlp.gate.weight", "was rounded from float32 to bfloat16, where a load of the source holds "
            "float32") in found  # fmt: skip


# files


def test_folders_that_loaders_read_go_along(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    route, dense = "query_0_SparseStaticEmbedding", "own_dense"
    wanted = [
        "qformer_tokenizer/tokenizer.json",
        "image_processor/preprocessor_config.json",
        f"{route}/config.json",
        f"{route}/model.safetensors",
        f"{dense}/config.json",
        f"{dense}/model.safetensors",
    ]
    left = ["samples/text.json", "text_encoder/model.safetensors", "document_0_MLMTransformer/model.safetensors"]
    for name in (*wanted, *left):
        (source / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"weight": torch.ones(4)}, source / name)
        else:
            (source / name).write_text("{}")
    (source / "router_config.json").write_text(json.dumps({"types": {route: "", "document_0_MLMTransformer": ""}}))
    modules = [{"path": "", "type": "sentence_transformers.models.Router"}, {"path": dense, "type": "mine.Dense"}]
    (source / "modules.json").write_text(json.dumps(modules))
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    assert [name for name in wanted if not (tmp_path / "output" / name).exists()] == []
    assert [name for name in left if (tmp_path / "output" / name).exists()] == []


def sharded_under_another_name(directory: Path) -> list[str]:
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    directory.mkdir()
    weights = [{f"layers.{i}.mlp.up_proj.weight": torch.randn(8, 8)} for i in range(2)]
    for name, tensors in zip(shards, weights, strict=True):
        save_file(tensors, directory / name, metadata={"format": "pt"})
    (directory / "config.json").write_text('{"model_type": "llama"}')
    index = {name: shard for shard, tensors in zip(shards, weights, strict=True) for name in tensors}
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return shards


def test_shards_are_read_by_their_index_whatever_it_is_called(tmp_path: Path) -> None:
    sharded_under_another_name(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "output", WITHOUT_COLUMNS).report.shards == 2


def test_one_shard_of_several_is_no_model_and_the_hint_leads_to_one(tmp_path: Path) -> None:
    shards = sharded_under_another_name(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="is one of 2 shards") as refused:
        convert(tmp_path / "source" / shards[0], tmp_path / "output", WITHOUT_COLUMNS)
    assert "directory" in refused.value.hint
    with pytest.raises(UnsupportedModelError, match="is an index"):
        convert(tmp_path / "source" / "diffusion_pytorch_model.safetensors.index.json", tmp_path / "output")
    (tmp_path / "source" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(UnsupportedModelError, match="without the index") as refused:
        convert(tmp_path / "source", tmp_path / "output", WITHOUT_COLUMNS)
    assert "Name one of the files" not in refused.value.hint
    assert not (tmp_path / "output").exists()


# digits that a load does not keep


@pytest.mark.parametrize("width", [24, 600_000], ids=["narrow", "wider than a block"])
def test_a_float16_weight_is_rounded_to_the_bfloat16_of_its_config_as_on_load(width: int, tmp_path: Path) -> None:
    from support.checkpoints import quantize_with_bitsandbytes

    name = "model.layers.0.mlp.up_proj"
    weight = torch.randn(3, width).mul(0.05).half()
    config = {"model_type": "llama", "torch_dtype": "bfloat16"}
    source = save_by_hand(tmp_path / "source", {f"{name}.weight": weight}, config)
    layouts: dict[LayoutName, torch.Tensor] = {"bitsandbytes": weight.bfloat16(), "compressed-tensors": weight}
    for layout, rounded in layouts.items():
        convert(source, tmp_path / layout, ConvertOptions(outliers="none", layout=layout))
        data, _ = quantize_with_bitsandbytes(rounded)
        assert torch.equal(read_all(tmp_path / layout)[f"{name}.weight"], data)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
def test_a_weight_with_nan_stays_a_float_in_the_dtype_that_loaders_give_it(
    layout: LayoutName, dtype: torch.dtype, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source = save_tiny("llama", tmp_path / "source", dtype)
    config = read_json(source / "config.json") | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    tensors = read_all(source)
    tensors[f"{DOWN}.weight"][1, 2] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "output", ConvertOptions(outliers="none", layout=layout, on_nonfinite="keep"))
    found = read_all(tmp_path / "output")[f"{DOWN}.weight"]
    assert torch.equal(found.nan_to_num(), tensors[f"{DOWN}.weight"].bfloat16().nan_to_num())
    assert found.isnan().sum() == 1
    assert verify(tmp_path / "output", VerifyOptions(source=source)).passed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output", device_map="cpu")
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, config["vocab_size"])


def test_a_weight_with_nan_that_an_earlier_version_copied_as_it_is_matches_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(8, 8).half()
    weight[1, 2] = torch.nan
    tensors = {"model.layers.0.mlp.up_proj.weight": weight, "model.layers.0.mlp.gate_proj.weight": torch.randn(8, 8)}
    source = save_by_hand(tmp_path / "source", tensors, {"model_type": "llama", "dtype": "bfloat16"})
    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "_written_dtype", lambda spec, _: spec.dtype)
        convert(source, tmp_path / "output", ConvertOptions(outliers="none", on_nonfinite="keep"))
    assert read_all(tmp_path / "output")["model.layers.0.mlp.up_proj.weight"].dtype == torch.float16
    checks = verify(tmp_path / "output", VerifyOptions(source=source)).checks
    assert {check.name for check in checks if check.status == "failed"} <= {"loads"}
