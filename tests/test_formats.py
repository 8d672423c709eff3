"""Every format of a checkpoint gives the same int8 bytes as safetensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import WITHOUT_COLUMNS, read_all, read_json, read_tensors, save_tiny, survey
from torch import Tensor

from int8cli import ConvertOptions, convert
from int8cli.errors import IndexFileError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as safetensors, and its conversion in the directory `int8` beside it."""
    directory = tmp_path_factory.mktemp("tiny")
    convert(save_tiny("llama", directory / "source"), directory / "int8", WITHOUT_COLUMNS)
    return directory


@pytest.fixture
def state(tiny: Path) -> dict[str, Tensor]:
    return read_all(tiny / "source")


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama without its weights."""
    shutil.copytree(tiny / "source", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "model"


def same_tensors(output: Path, tiny: Path) -> bool:
    written, expected = read_all(output), read_all(tiny / "int8")
    assert set(written) == set(expected)
    return all(torch.equal(written[n], t) and written[n].dtype == t.dtype for n, t in expected.items())


def opens_in_transformers(output: Path, tiny: Path) -> bool:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(output, output_loading_info=True, device_map="cpu")
    assert not any(info.values())
    state = model.state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in read_all(tiny / "int8").items())


def split(state: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    names = sorted(state)
    return [{name: state[name] for name in names[part::parts]} for part in range(parts)]


def write_index(directory: Path, name: str, shards: dict[str, dict[str, Tensor]]) -> None:
    weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    (directory / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


# PyTorch files


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_single_bin_becomes_model_safetensors(
    legacy: bool, source: Path, state: dict[str, Tensor], tiny: Path, tmp_path: Path
) -> None:
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    assert [p.name for p in (tmp_path / "output").glob("*.safetensors")] == ["model.safetensors"]
    assert same_tensors(tmp_path / "output", tiny)
    assert opens_in_transformers(tmp_path / "output", tiny)


def test_bin_shards_become_safetensors_shards(
    source: Path, state: dict[str, Tensor], tiny: Path, tmp_path: Path
) -> None:
    shards = {f"pytorch_model-0000{i}-of-00003.bin": part for i, part in enumerate(split(state, 3), 1)}
    for name, tensors in shards.items():
        torch.save(tensors, source / name)
    write_index(source, "pytorch_model.bin.index.json", shards)
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    index = read_json(tmp_path / "output" / "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == {name.replace(".bin", ".safetensors") for name in shards}
    assert not list((tmp_path / "output").glob("pytorch_model.bin*"))
    assert same_tensors(tmp_path / "output", tiny)
    assert opens_in_transformers(tmp_path / "output", tiny)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.bin", "a.pt"), "a.bin and a.pt would both be written to a.safetensors"),
        (("d/a.pth", "d/a.bin"), "would both be written to d/a.safetensors"),
        (("int8/outliers/a.bin", "b.bin"), "int8/outliers/a.bin would become int8/outliers/a.safetensors"),
    ],
)
def test_shards_with_conflicting_output_names_are_refused(
    names: tuple[str, ...], message: str, source: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    shards = dict(zip(names, split(state, len(names)), strict=True))
    for name, tensors in shards.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, source / name)
    write_index(source, "pytorch_model.bin.index.json", shards)
    with pytest.raises(IndexFileError, match=message):
        convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    assert not list((tmp_path / "output").rglob("*.safetensors"))


def test_files_in_a_directory_named_like_ours_are_not_copied(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "source", tmp_path / "model")
    (tmp_path / "model/int8").mkdir()
    (tmp_path / "model/int8/report.py").write_text("theirs")
    convert(tmp_path / "model", tmp_path / "output", WITHOUT_COLUMNS)
    left = read_json(tmp_path / "output/int8/report.json")["passed_over"]
    assert {"file": "int8/report.py", "reason": "in the directory of int8cli's own files"} in left
    assert not (tmp_path / "output/int8/report.py").exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "some.bin"])
def test_a_single_pytorch_file_is_a_model(
    name: str, source: Path, state: dict[str, Tensor], tiny: Path, tmp_path: Path
) -> None:
    torch.save(state, source / name)
    convert(source / name, tmp_path / "output", WITHOUT_COLUMNS)
    assert same_tensors(tmp_path / "output", tiny)
    assert (tmp_path / "output" / "config.json").exists()


def test_tied_tensors_of_a_bin_are_written_under_each_name(tmp_path: Path) -> None:
    source = save_tiny("llama-tied", tmp_path / "source")
    convert(source, tmp_path / "expected", WITHOUT_COLUMNS)
    state = read_all(source)
    embedding = state["model.embed_tokens.weight"]
    (source / "model.safetensors").unlink()
    torch.save({**state, "lm_head.weight": embedding}, source / "pytorch_model.bin")
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    written, expected = read_all(tmp_path / "output"), read_all(tmp_path / "expected")
    assert torch.equal(written.pop("lm_head.weight"), embedding)
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_slices_of_one_storage_are_distinguished(tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    fused = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)).half()
    parts = {f"h.0.attn.{n}_proj.weight": fused[10 * i : 10 * i + 10] for i, n in enumerate("qkv")}
    torch.save({**parts, "norm.weight": fused[4, 3:9]}, source / "pytorch_model.bin")
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    (plain := tmp_path / "plain").mkdir()
    tensors = {name: t.clone() for name, t in parts.items()} | {"norm.weight": fused[4, 3:9].clone()}
    save_file(tensors, plain / "model.safetensors")
    convert(plain, tmp_path / "expected", WITHOUT_COLUMNS)
    written, expected = read_all(tmp_path / "output"), read_all(tmp_path / "expected")
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_bin_that_stores_transposes_is_read_the_right_way_round(
    legacy: bool, source: Path, state: dict[str, Tensor], tiny: Path, tmp_path: Path
) -> None:
    turned = {name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in state.items()}
    assert not turned["model.layers.0.mlp.up_proj.weight"].is_contiguous()
    torch.save(turned, source / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    assert same_tensors(tmp_path / "output", tiny)


def test_transposes_larger_than_a_block_are_read_the_right_way_round(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "layers.0.mlp.up_proj.weight": torch.randn(1500, 701, generator=generator).bfloat16(),
        "embed_tokens.weight": torch.randn(900, 1031, generator=generator).bfloat16(),
        "table": torch.arange(800 * 900).reshape(800, 900),
    }
    for name in ("bin", "plain"):
        (tmp_path / name).mkdir()
    turned = {name: tensor.t().contiguous().t() for name, tensor in tensors.items()}
    torch.save(turned, tmp_path / "bin" / "pytorch_model.bin")
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    for name in ("bin", "plain"):
        convert(tmp_path / name, tmp_path / f"{name}-int8", ConvertOptions(outliers="none", threads=3))
    written, expected = read_all(tmp_path / "bin-int8"), read_all(tmp_path / "plain-int8")
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_a_conv1d_stored_transposed_in_a_bin_is_transposed_twice(tmp_path: Path) -> None:
    source = save_tiny("gpt2", tmp_path / "source")
    convert(source, tmp_path / "expected", WITHOUT_COLUMNS)
    state = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in read_all(source).items()}
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    written, expected = read_all(tmp_path / "output"), read_all(tmp_path / "expected")
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("form", ["plain", "turned"])
def test_what_float16_models_keep_in_float32_is_widened_and_keeps_its_values(form: str, tmp_path: Path) -> None:
    source = save_tiny("t5", tmp_path / "source", torch.float16)
    state = read_all(source)
    if form == "turned":
        (source / "model.safetensors").unlink()
        turned = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in state.items()}
        torch.save(turned, source / "pytorch_model.bin")
    convert(source, tmp_path / "output", ConvertOptions(outliers="none", threads=3))
    written = read_all(tmp_path / "output")
    widened = {name for name in state if written[name].dtype == torch.float32}
    assert widened == {name for name in state if name.endswith(".wo.weight")}
    assert all(torch.equal(written[name], state[name].float()) for name in widened)


# Safetensors


def test_a_safetensors_file_is_a_model_with_the_config_beside_it(tiny: Path, tmp_path: Path) -> None:
    convert(tiny / "source" / "model.safetensors", tmp_path / "output", WITHOUT_COLUMNS)
    assert same_tensors(tmp_path / "output", tiny)
    config = read_json(tmp_path / "output" / "config.json")
    assert config["quantization_config"]["load_in_8bit"] is True
    assert config == read_json(tiny / "int8" / "config.json")


def test_a_safetensors_file_alone_is_a_model_without_a_config(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "lone").mkdir()
    shutil.copy(tiny / "source" / "model.safetensors", tmp_path / "lone" / "llama.safetensors")
    convert(tmp_path / "lone" / "llama.safetensors", tmp_path / "output", WITHOUT_COLUMNS)
    assert same_tensors(tmp_path / "output", tiny)
    assert not (tmp_path / "output" / "config.json").exists()


def test_one_file_of_any_name_gets_the_name_that_loaders_expect(tiny: Path, source: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "source" / "model.safetensors", source / "my_llama_v2.safetensors")
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    assert [p.name for p in (tmp_path / "output").glob("*.safetensors")] == ["model.safetensors"]
    assert opens_in_transformers(tmp_path / "output", tiny)


def test_shards_keep_their_names_and_directories(
    tiny: Path, source: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    parts = split(state, 3)
    shards = {
        "model_00001-of-00003.safetensors": parts[0],
        "deep/er/b.safetensors": parts[1],
        "c.safetensors": parts[2],
    }
    for name, tensors in shards.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, source / name, metadata={"format": "pt"})
    write_index(source, "model.safetensors.index.json", shards)
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    index = read_json(tmp_path / "output" / "model.safetensors.index.json")
    for name, tensors in shards.items():
        assert set(tensors) <= set(read_tensors(tmp_path / "output" / name))
        assert {index["weight_map"][tensor] for tensor in tensors} == {name}
    assert same_tensors(tmp_path / "output", tiny)
    assert opens_in_transformers(tmp_path / "output", tiny)


def test_an_index_of_one_shard_becomes_a_single_file(
    tiny: Path, source: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(state, source / "model-00001-of-00001.safetensors")
    write_index(source, "model.safetensors.index.json", {"model-00001-of-00001.safetensors": state})
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    assert [p.name for p in (tmp_path / "output").glob("model*")] == ["model.safetensors"]
    assert same_tensors(tmp_path / "output", tiny)


def test_of_both_formats_only_the_safetensors_are_opened(tiny: Path, source: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "source" / "model.safetensors", source / "model.safetensors")
    (source / "pytorch_model.bin").write_bytes(b"opening this would fail")
    report = convert(source, tmp_path / "output", WITHOUT_COLUMNS).report
    assert same_tensors(tmp_path / "output", tiny)
    assert "pytorch_model.bin" in dict(report.passed_over)
    assert not (tmp_path / "output" / "pytorch_model.bin").exists()


def test_metadata_of_the_source_is_copied(tiny: Path, source: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    from safetensors import safe_open

    save_file(state, source / "model.safetensors", metadata={"trained_by": "someone"})
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    with safe_open(tmp_path / "output" / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "trained_by": "someone"}


def test_a_survey_of_a_bin_foresees_its_size(source: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, source / "pytorch_model.bin")
    foreseen = survey(source).output_bytes
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    assert (tmp_path / "output" / "model.safetensors").stat().st_size == foreseen
