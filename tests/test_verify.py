"""Every fault of a conversion is found and named. Good conversions of many architectures pass."""

import fcntl
import importlib.util
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import (
    LISTED,
    WITHOUT_COLUMNS,
    build_tiny,
    convert_storing,
    read_json,
    read_tensors,
    save_by_hand,
    save_tiny,
    some_columns,
    stored_at,
)
from support.hub_stand_in import HubStandIn
from support.program import CONVERT, Nursery, llama, run, tree, write_json
from support.verifying import verified

from int8cli import ConvertOptions, convert
from int8cli.checkpoint.digest import new_digest
from int8cli.errors import OutputError, OutputInUseError
from int8cli.planning.blocks import BLOCK_ELEMENTS
from int8cli.results.verification import Check, Verification

WHOLE = ("records", "shards", "sidecars", "tensors", "index", "config", "report", "files", "loads")
SKIPS = "llm_int8_skip_modules"
SHARD = "model-00002-of-00003.safetensors"
QUANTIZED = "model.layers.0.self_attn.v_proj"


def failures(verification: Verification) -> dict[str, list[tuple[str, str | None, str]]]:
    """What failed, by check."""
    return {
        check.name: [(failure.file, failure.tensor, failure.problem) for failure in check.failures]
        for check in verification.checks
        if check.status == "failed"
    }


def named(verification: Verification) -> set[tuple[str, str | None]]:
    """The files and tensors that failures name."""
    return {(file, tensor) for found in failures(verification).values() for file, tensor, _ in found}


def check_of(verification: Verification, name: str) -> Check:
    return next(check for check in verification.checks if check.name == name)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA in three shards, with a zero row, and its conversion beside it."""
    root = tmp_path_factory.mktemp("verify")
    convert(llama(root / "source"), root / "out", WITHOUT_COLUMNS)
    return root


@pytest.fixture
def source(original: Path) -> Path:
    return original / "source"


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    """A copy of the conversion, to be damaged."""
    return Path(shutil.copytree(original / "out", tmp_path / "out"))


def header_end(file: Path) -> int:
    with open(file, "rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


def places(file: Path) -> dict[str, tuple[int, int]]:
    """Where in a file each tensor begins and ends."""
    end = header_end(file)
    header = json.loads(file.read_bytes()[8:end])
    return {
        name: (end + entry["data_offsets"][0], end + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def flip(file: Path, offset: int, bit: int = 0) -> None:
    with open(file, "r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1 << bit]))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    data = read_json(path)
    change(data)
    path.write_text(json.dumps(data, indent=1) + "\n")


# What is whole passes


def test_every_check_of_a_good_conversion_passes(out: Path, source: Path) -> None:
    verification = verified(out, source)
    assert verification.passed
    expected = dict.fromkeys([*WHOLE, "source", "weights", "method", "figures", "copies"], "passed")
    assert {check.name: check.status for check in verification.checks} == expected


def test_verifying_changes_nothing(out: Path, source: Path) -> None:
    before = tree(out)
    verified(out, source)
    assert tree(out) == before


def test_the_check_names_the_version_of_transformers(out: Path) -> None:
    import transformers

    loads = check_of(verified(out), "loads")
    assert f"transformers {transformers.__version__}" in loads.detail
    assert "14 of 14 int8 layers" in loads.detail


@pytest.mark.parametrize(
    "architecture",
    [
        "bloom",
        "opt",
        "gpt2",
        "llama-tied",
        "phi3",
        "bart",
        "roberta",
        "whisper",
        "vit",
        "t5-gated",
        "mixtral",
        "falcon",
    ],
)
def test_architectures_match_their_source(architecture: str, tmp_path: Path) -> None:
    source = save_tiny(architecture, tmp_path / "source")
    convert(source, tmp_path / "out", WITHOUT_COLUMNS)
    verification = verified(tmp_path / "out", source)
    assert failures(verification) == {}
    assert check_of(verification, "loads").status == "passed"


def test_names_without_the_base_models_prefix_load(tmp_path: Path) -> None:
    model = build_tiny(LISTED["bloom"])
    tensors = {name.removeprefix("transformer."): t.clone() for name, t in model.state_dict().items()}
    tensors.pop("lm_head.weight")
    source = save_by_hand(
        tmp_path / "source", tensors, {**model.config.to_dict(), "architectures": ["BloomForCausalLM"]}
    )
    convert(source, tmp_path / "out", WITHOUT_COLUMNS)
    assert failures(verified(tmp_path / "out", source)) == {}


def test_a_legacy_bin_in_float32_matches_its_source(tmp_path: Path) -> None:
    source = llama(tmp_path / "source", shards=1, dtype=torch.float32)
    torch.save(read_tensors(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    convert(source, tmp_path / "out", ConvertOptions(outliers="none", float32="float16"))
    assert failures(verified(tmp_path / "out", source)) == {}


def test_weights_copied_for_non_finite_values_match_their_source(tmp_path: Path) -> None:
    source = llama(tmp_path / "source", shards=1)
    tensors = read_tensors(source / "model.safetensors")
    tensors[f"{QUANTIZED}.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out", ConvertOptions(outliers="none", on_nonfinite="keep"))
    verification = verified(tmp_path / "out", source)
    assert failures(verification) == {}
    assert "13 layers" in check_of(verification, "figures").detail


def test_a_model_card_may_be_edited(out: Path) -> None:
    (out / "README.md").write_text("# Mine\n")
    assert verified(out).passed


def test_a_checkpoint_without_config_is_not_loaded(tmp_path: Path) -> None:
    source = save_by_hand(tmp_path / "source", {f"{QUANTIZED}.weight": torch.randn(8, 8)})
    convert(source, tmp_path / "out", WITHOUT_COLUMNS)
    verification = verified(tmp_path / "out", source)
    assert verification.passed
    assert check_of(verification, "loads").status == "not checked"


def test_floats_that_convert_casts_hold(tmp_path: Path) -> None:
    source = llama(tmp_path / "source", shards=1)
    tensors = read_tensors(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out", WITHOUT_COLUMNS)
    assert failures(verified(tmp_path / "out", source)) == {}


# Bytes


@pytest.mark.parametrize(
    "tensor",
    [
        f"{QUANTIZED}.weight",
        f"{QUANTIZED}.SCB",
        f"{QUANTIZED}.weight_format",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
    ],
)
@pytest.mark.parametrize("end", [0, -1])
def test_a_flipped_bit_is_found_in_its_tensor(tensor: str, end: int, out: Path) -> None:
    file = next(file for file in sorted(out.glob("*.safetensors")) if tensor in places(file))
    flip(file, places(file)[tensor][0] if end == 0 else places(file)[tensor][1] - 1, bit=7)
    found = failures(verified(out))
    assert [(name, where) for name, where, _ in found.pop("shards")] == [(file.name, tensor)]
    assert found == {}


def test_flipped_bits_anywhere_are_found(out: Path) -> None:
    file, chance = out / SHARD, random.Random(0)
    size = file.stat().st_size
    for offset in [*range(9), header_end(file) - 1, size - 1, *(chance.randrange(size) for _ in range(20))]:
        bit = chance.randrange(8)
        flip(file, offset, bit)
        assert (file.name, None) in named(verified(out)) or any(name == file.name for name, _ in named(verified(out)))
        flip(file, offset, bit)
    assert verified(out).passed


def test_padding_of_a_header_counts_too(out: Path) -> None:
    padded = next(file for file in out.glob("*.safetensors") if file.read_bytes()[header_end(file) - 1] == ord(" "))
    data = bytearray(padded.read_bytes())
    data[header_end(padded) - 1] = ord("\n")
    padded.write_bytes(data)
    assert failures(verified(out)) == {
        "shards": [(padded.name, None, "its header differs from the one that was written")],
    }


@pytest.mark.parametrize("change", [-1, 1, -1000], ids=["short", "long", "cut"])
def test_another_size_is_named_with_both_sizes(change: int, out: Path) -> None:
    data = (out / SHARD).read_bytes()
    (out / SHARD).write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    problem = f"has {len(data) + change:,} bytes; {len(data):,} were written"
    assert failures(verified(out))["shards"] == [(SHARD, None, problem)]


def test_a_missing_shard_is_named(out: Path) -> None:
    (out / SHARD).unlink()
    assert failures(verified(out))["shards"] == [(SHARD, None, "is missing")]


def test_swapped_shards_are_recognised(tmp_path: Path) -> None:
    source = llama(tmp_path / "source", layers=2, shards=1)
    tensors = read_tensors(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    files = ["model-00001-of-00003.safetensors", SHARD, "model-00003-of-00003.safetensors"]
    parts = [{n: t for n, t in tensors.items() if ".layers." not in n}]
    parts += [{n: t for n, t in tensors.items() if f".layers.{layer}." in n} for layer in (0, 1)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, source / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    write_json(source / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    out = tmp_path / "out"
    convert(source, out, WITHOUT_COLUMNS)
    first, second = out / files[1], out / files[2]
    first.rename(out / "aside")
    second.rename(first)
    (out / "aside").rename(second)
    assert failures(verified(out))["shards"] == [
        (files[1], None, f"is {files[2]} under another name"),
        (files[2], None, f"is {files[1]} under another name"),
    ]


# Files that describe the shards


def test_an_extra_shard_in_the_index_is_named(out: Path) -> None:
    def add(index: Any) -> None:
        index["weight_map"]["extra.weight"] = "model-00004-of-00003.safetensors"

    edit(out / "model.safetensors.index.json", add)
    found = failures(verified(out))["index"]
    assert any("model-00004-of-00003.safetensors" in problem for _, _, problem in found)
    assert ("model.safetensors.index.json", "extra.weight", "is listed, but no shard has it") in found


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        (lambda index: index["weight_map"].pop(f"{QUANTIZED}.SCB"), f"{QUANTIZED}.SCB", "is missing"),
        (
            lambda index: index["weight_map"].update({f"{QUANTIZED}.SCB": "x"}),
            f"{QUANTIZED}.SCB",
            "should be in model-",
        ),
        (lambda index: index["metadata"].update(total_size=1), None, "total_size is 1, the tensors have"),
        (lambda index: index.pop("metadata"), None, "total_size is None"),
        (lambda index: index.pop("weight_map"), None, "has no weight_map"),
    ],
    ids=["entry gone", "entry moved", "total", "metadata", "map"],
)
def test_a_wrong_index_is_named(change: Callable[[Any], object], where: str | None, what: str, out: Path) -> None:
    edit(out / "model.safetensors.index.json", change)
    found = failures(verified(out))
    assert any(tensor == where and problem.startswith(what) for _, tensor, problem in found["index"])
    assert found["files"] == [("model.safetensors.index.json", None, "differs from what was written")]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: c["quantization_config"].update(llm_int8_threshold=5.0), "llm_int8_threshold is 5.0, not 6.0"),
        (lambda c: c["quantization_config"].update(load_in_8bit=False), "load_in_8bit is False, not True"),
        (lambda c: c["quantization_config"].update(bits=8), "bits is 8, not None"),
        (lambda c: c["quantization_config"].pop("llm_int8_skip_modules"), "llm_int8_skip_modules is None"),
        (lambda c: c["quantization_config"][SKIPS].append("v_proj"), "covers a layer that is in int8"),
        (lambda c: c.pop("quantization_config"), "has no quantization_config"),
    ],
    ids=["threshold", "bits", "added", "no list", "list", "gone"],
)
def test_an_edited_quantization_config_is_named(change: Callable[[Any], object], what: str, out: Path) -> None:
    edit(out / "config.json", change)
    found = failures(verified(out))
    assert any(what in problem for _, _, problem in found["config"])
    assert found["files"] == [("config.json", None, "differs from what was written")]


@pytest.mark.parametrize("entry", [r"(\\w+\\.?)+$", "(a|a)*$", "x" + "a?" * 40 + "a" * 40, ".*a" * 12])
def test_an_expression_that_could_take_any_time_is_not_matched(entry: str, out: Path) -> None:
    edit(out / "config.json", lambda config: config["quantization_config"][SKIPS].append(entry))
    result = verified(out)
    assert any("could take years to match" in problem for _, _, problem in failures(result)["config"])
    (loads,) = [check for check in result.checks if check.name == "loads"]
    assert "could take years to match" in str(loads)


def test_any_other_edit_of_the_config_is_detected(out: Path) -> None:
    edit(out / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    assert failures(verified(out)) == {"files": [("config.json", None, "differs from what was written")]}


def test_an_invalid_config_is_named(out: Path) -> None:
    (out / "config.json").write_text("{")
    assert {"config", "files", "loads"} <= set(failures(verified(out)))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "LICENSE"])
def test_changes_of_copied_files_are_detected(name: str, out: Path) -> None:
    (out / name).write_text("other")
    assert failures(verified(out)) == {"files": [(name, None, "differs from what was written")]}
    (out / name).unlink()
    assert failures(verified(out)) == {"files": [(name, None, "is missing")]}


def test_weights_that_a_loader_would_load_instead_are_named(out: Path) -> None:
    shutil.copy(out / SHARD, out / "model.safetensors")
    assert [name for name, _, _ in failures(verified(out))["files"]] == ["model.safetensors"]


def test_figures_in_the_report_are_those_of_the_records(out: Path) -> None:
    edit(out / "int8" / "report.json", lambda report: report["layers"][3].update(sqnr_db=99.0))
    layer = read_json(out / "int8" / "report.json")["layers"][3]["name"]
    assert failures(verified(out))["report"] == [
        ("int8/report.json", layer, "its figures differ from its record"),
    ]


def record_path(out: Path) -> Path:
    return out / "int8" / "records" / f"{SHARD.removesuffix('.safetensors')}.json"


def test_a_tensor_that_the_source_had_and_the_output_lacks_is_named(out: Path) -> None:
    lost = {"name": "model.layers.0.lost.weight", "dtype": "BF16", "shape": [2, 2]}
    edit(record_path(out), lambda record: record["source_tensors"].append(lost))
    assert failures(verified(out))["tensors"] == [(SHARD, "model.layers.0.lost.weight", "is missing")]


def test_a_tensor_that_the_source_had_not_is_named(out: Path) -> None:
    dropped = read_json(record_path(out))["source_tensors"][0]["name"]
    edit(record_path(out), lambda record: record["source_tensors"].pop(0))
    tensors = {tensor for _, tensor, _ in failures(verified(out))["tensors"]}
    assert dropped in tensors


def test_a_damaged_record_is_named(out: Path) -> None:
    record_path(out).write_text("{}")
    assert any("is damaged or was edited" in problem for _, _, problem in failures(verified(out))["records"])
    record_path(out).unlink()
    assert failures(verified(out))["records"] == [(SHARD, None, "has no record")]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda record: record["files"][0]["tensors"][1].update(dtype="BF17"), "has the unknown dtype 'BF17'"),
        (lambda record: record["files"][0].update(file=None), "files[0].file is None, not str"),
        (lambda record: record["files"][0]["tensors"][0].update(shape=["8"]), "tensors[0].shape[0] is '8', not int"),
        (lambda record: record["files"][0]["tensors"][0].update(shape=[-8]), "tensors[0].shape[0] is -8"),
        (lambda record: record["files"][0]["tensors"][0].update(shape=[2**62, 2**62]), "larger than any file"),
        (lambda record: record["source_tensors"][0].update(shape=[2**31] * 3), "larger than any file"),
        (lambda record: record["files"][0].update(file="../" + SHARD), "files[0].file is '../"),
        (lambda record: record["files"][0].update(file="int8/conversion.json"), "files[0].file is 'int8/conversion"),
        (lambda record: record["layers"][0].update(sum_squared_error="x"), "sum_squared_error is 'x', not float"),
        (lambda record: record["layers"][1].update(sum_squared_weight=-1.0), "layers[1].sum_squared_weight is -1.0"),
        (lambda record: record["layers"][1].update(sum_squared_weight=None), "is null, but other figures are not"),
        (lambda record: record["layers"][0].update(shape=[8]), "layers[0].shape has 1 values, not 2"),
        (lambda record: record["layers"].append(5), "is 5, not an object"),
        (lambda record: record["kept"].append({"tensor": 1, "place": ""}), "kept[0].tensor is 1, not str"),
        (lambda record: record.update(files=[]), "files does not name a file"),
        (lambda record: record.update(more=1), "has the unknown field 'more'"),
        (lambda record: record.pop("kept"), "has no field 'kept'"),
        (lambda record: record.update(schema="int8cli.record/9"), "is 'int8cli.record/9', but this version reads"),
    ],
)
def test_an_impossible_value_in_a_record_is_named(change: Callable[[Any], object], problem: str, out: Path) -> None:
    edit(record_path(out), change)
    [(file, _, found)] = failures(verified(out))["records"]
    assert file == SHARD
    assert "is damaged or was edited: " in found
    assert problem in found


def test_edited_settings_are_detected(out: Path) -> None:
    edit(out / "int8" / "conversion.json", lambda conversion: conversion["settings"].update(threshold=3.0))
    assert {"config", "report"} <= set(failures(verified(out)))


@pytest.mark.parametrize("change", ["lose", "add"])
def test_a_manifest_of_other_files_is_detected(change: str, out: Path) -> None:
    (out / "notes.txt").write_text((out / "LICENSE").read_text())

    def edited(document: Any) -> None:
        [license_file] = (each for each in document["files"] if each["file"] == "LICENSE")
        if change == "lose":
            document["files"].remove(license_file)
        else:
            document["files"].append({**license_file, "file": "notes.txt"})

    edit(out / "int8/files.json", edited)
    [(file, _, problem)] = failures(verified(out))["files"]
    assert file == "int8/files.json"
    assert problem in ("does not name LICENSE", "names notes.txt, which is not a file of this conversion")


@pytest.mark.parametrize("name", ["README.md", "model-00003-of-00003.safetensors", "int8/outliers/other.safetensors"])
def test_a_record_cannot_name_files_of_others(name: str, out: Path) -> None:
    """With `keep_output` off, the files that it names are removed once they are uploaded."""
    edit(record_path(out), lambda record: record["files"].append({**record["files"][0], "file": name}))
    assert f"{name!r}, which is not a file of the shard {SHARD}" in str(failures(verified(out))["records"])


# Directories that are not to be verified


def test_an_unfinished_conversion_says_which_shards_are_missing(out: Path) -> None:
    (out / "int8" / "files.json").unlink()
    record_path(out).unlink()
    (out / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(OutputError, match=rf"not finished: 2 of 3 shards are missing: {SHARD}, model-00003") as caught:
        verified(out)
    assert "convert" in caught.value.hint


def test_a_directory_without_a_conversion_is_refused(source: Path, tmp_path: Path) -> None:
    for directory in (source, tmp_path / "nowhere"):
        with pytest.raises(OutputError, match="is not a conversion"):
            verified(directory)
    assert not (tmp_path / "nowhere").exists()


def test_a_directory_that_is_being_written_is_refused(out: Path) -> None:
    descriptor = os.open(out / "int8", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(OutputInUseError):
            verified(out)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a//b", "a/./b", "a\\b", "a\0b", "int8/records/x.json", ""]
)
@pytest.mark.parametrize("file", ["conversion.json", "files.json"])
def test_records_cannot_name_files_outside_the_directory(file: str, name: str, out: Path) -> None:
    entry = name if file == "conversion.json" else {"file": name, "size_bytes": 0, "xxh3_128": ""}
    edit(out / "int8" / file, lambda document: document["files"].append(entry))
    with pytest.raises(OutputError, match=rf"int8/{file} is damaged or was edited: files\[\d+\]"):
        verified(out)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda conversion: conversion["files"].insert(0, 5), "files[0] is 5"),
        (lambda conversion: conversion["shards"][0].update(output=1.5), "shards[0].output is 1.5"),
        (lambda conversion: conversion["shards"][0].update(output="x.json"), "shards[0].output is 'x.json'"),
        (lambda conversion: conversion["shards"][0].update(file=[]), "shards[0].file is []"),
        (lambda conversion: conversion["shards"][0].update(size_bytes="x"), "shards[0].size_bytes is 'x'"),
        (lambda conversion: conversion["shards"].append(conversion["shards"][0]), "shards has one output for two"),
        (lambda conversion: conversion["settings"].update(layout=None), "settings.layout is None"),
        (lambda conversion: conversion["settings"].update(layout="new"), "names the layout 'new'"),
        (lambda conversion: conversion["settings"].update(skip=5), "settings.skip is 5"),
        (lambda conversion: conversion["settings"].update(threshold=math.nan), "settings.threshold is nan"),
        (lambda conversion: conversion["source"].update(name=5), "source.name is 5"),
        (lambda conversion: conversion.update(schema=[1]), "schema is [1]"),
        (lambda conversion: conversion.pop("plan"), "has no field 'plan'"),
    ],
)
def test_an_edited_conversion_json_is_an_error_that_names_the_field(
    change: Callable[[Any], object], field: str, out: Path
) -> None:
    edit(out / "int8" / "conversion.json", change)
    with pytest.raises(OutputError) as raised:
        verified(out)
    assert field in str(raised.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda report: report["layers"].insert(0, 5), "layers[0] is 5, not an object"),
        (lambda report: report["layers"][0].update(name=[]), "layers[0].name is [], not str"),
        (lambda report: report.update(totals=[]), "totals is [], not an object"),
        (lambda report: report.update(settings=None), "settings is None, not an object"),
        (lambda report: report.pop("layers"), "layers is None, not a list"),
    ],
)
def test_a_report_with_values_of_another_type_is_named(
    change: Callable[[Any], object], problem: str, out: Path
) -> None:
    edit(out / "int8" / "report.json", change)
    assert ("int8/report.json", None, f"is damaged or was edited: {problem}") in failures(verified(out))["report"]


def test_a_quantized_tensor_that_was_not_a_matrix_is_named(out: Path) -> None:
    layer = read_json(record_path(out))["layers"][0]["name"]

    def change(record: Any) -> None:
        next(each for each in record["source_tensors"] if each["name"] == f"{layer}.weight").update(shape=[1, 2, 3])

    edit(record_path(out), change)
    found = [problem for _, name, problem in failures(verified(out))["tensors"] if name == f"{layer}.weight"]
    assert "is reported as quantized, but was [1, 2, 3] in the source" in found


# Loading


def test_int8_is_named_if_the_loader_has_a_float_layer(out: Path) -> None:
    edit(out / "config.json", lambda c: c["quantization_config"]["llm_int8_skip_modules"].append("v_proj"))
    found = failures(verified(out))["loads"]
    assert {tensor for _, tensor, _ in found} >= {f"model.layers.{layer}.self_attn.v_proj.weight" for layer in (0, 1)}


def test_a_float_layer_is_named_if_the_loader_expects_int8(out: Path) -> None:
    edit(out / "config.json", lambda c: c["quantization_config"].update(llm_int8_skip_modules=["nothing"]))
    assert "lm_head.weight" in {tensor for _, tensor, _ in failures(verified(out))["loads"]}


def test_a_config_with_another_width_does_not_load(out: Path) -> None:
    edit(out / "config.json", lambda config: config.update(intermediate_size=100))
    tensors = {tensor for _, tensor, _ in failures(verified(out))["loads"]}
    assert "model.layers.0.mlp.up_proj.weight" in tensors


def test_tensors_that_the_model_does_not_take_from_the_source_either_are_no_failure(tmp_path: Path) -> None:
    source = llama(tmp_path / "source", shards=1)
    tensors = read_tensors(source / "model.safetensors")
    extra = {"old.head.bias": torch.zeros(4), "old.q_proj.weight": torch.randn(8, 8).bfloat16()}
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out", WITHOUT_COLUMNS)
    assert failures(verified(tmp_path / "out", source)) == {}


def test_a_model_with_its_own_code_is_not_loaded(tmp_path: Path) -> None:
    source = llama(tmp_path / "source", shards=1)
    edit(source / "config.json", lambda c: c.update(model_type="strange", auto_map={"AutoConfig": "evil.Config"}))
    (source / "evil.py").write_text("raise SystemExit('foreign code ran')\n")
    convert(source, tmp_path / "out", WITHOUT_COLUMNS)
    verification = verified(tmp_path / "out")
    assert verification.passed
    assert "does not know the model type 'strange'" in check_of(verification, "loads").detail


def test_without_transformers_the_check_of_loading_is_skipped(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    absent = {"transformers": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: absent.get(name, name) and find(name, *a))
    loads = check_of(verified(out), "loads")
    assert (loads.status, loads.detail) == ("not checked", "needs transformers, which is not installed")


# Against the source


def change_source(source: Path, tensor: str, place: tuple[int, ...], directory: Path) -> Path:
    """A copy of a source with one value changed in the middle of a file."""
    changed = Path(shutil.copytree(source, directory / "changed"))
    file = next(file for file in changed.glob("*.safetensors") if tensor in read_tensors(file))
    tensors = read_tensors(file)
    tensors[tensor][place] *= -1
    save_file(tensors, file, metadata={"format": "pt"})
    return changed


def test_a_changed_weight_in_the_source_is_reported_with_its_position(out: Path, source: Path, tmp_path: Path) -> None:
    verification = verified(out, change_source(source, f"{QUANTIZED}.weight", (7, 9), tmp_path))
    found = failures(verification)["weights"]
    assert [(tensor, problem) for _, tensor, problem in found] == [
        (f"{QUANTIZED}.weight", "differs from the conversion of the source, first at [7, 9]")
    ]
    assert "figures" not in failures(verification)  # a sign changes no error


def test_a_changed_copy_is_reported_with_its_position(out: Path, source: Path, tmp_path: Path) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    found = failures(verified(out, change_source(source, norm, (5,), tmp_path)))
    assert [(tensor, problem) for _, tensor, problem in found["weights"]] == [
        (norm, "differs from the conversion of the source, first at [5]")
    ]


def test_another_source_is_reported(out: Path, tmp_path: Path) -> None:
    found = failures(verified(out, llama(tmp_path / "other", seed=1)))
    assert {"source", "weights", "figures"} <= set(found)
    assert found["source"][0][2] == "is not the file that was converted"


def test_figures_are_recomputed(out: Path, source: Path) -> None:
    """Report and record agree with each other, but are wrong."""
    layer = next(layer for layer in read_json(record_path(out))["layers"])["name"]

    def worsen(layers: Any) -> None:
        next(each for each in layers if each["name"] == layer)["sum_squared_error"] *= 1.001

    edit(record_path(out), lambda record: worsen(record["layers"]))
    found = failures(verified(out, source))
    assert [(tensor, problem.split()[0]) for _, tensor, problem in found["figures"]] == [(layer, "sum_squared_error")]


def test_a_copied_file_that_changed_in_the_source_is_named(out: Path, source: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(source, tmp_path / "changed"))
    (changed / "tokenizer_config.json").write_text("{}")
    assert failures(verified(out, changed)) == {
        "copies": [("tokenizer_config.json", None, "differs from the file in the source")]
    }


# Sidecars


SIDECAR = f"int8/outliers/{SHARD}"


@pytest.fixture(scope="module")
def original_with_sidecars(original: Path) -> Path:
    convert_storing(original / "source", original / "beside", some_columns)
    return original / "beside"


@pytest.fixture
def beside(original_with_sidecars: Path, tmp_path: Path) -> Path:
    """A copy of the conversion with stored columns, to be damaged."""
    return Path(shutil.copytree(original_with_sidecars, tmp_path / "out"))


def record_as_written(out: Path, tensor: str) -> None:
    """Make the record agree with the current sidecar, so that digests cannot reveal the change."""
    start, end = places(out / SIDECAR)[tensor]
    digest = new_digest()
    digest.update((out / SIDECAR).read_bytes()[start:end])

    def change(record: Any) -> None:
        entry = next(each for each in record["files"][1]["tensors"] if each["name"] == tensor)
        entry["xxh3_128"] = digest.hexdigest()

    edit(record_path(out), change)


def change_columns(out: Path, *indices: object) -> str:
    """Make record and report speak of other columns of the first layer in a record; returns its name."""
    columns = [{"index": index, "absmax": None, "error_share": None, "suspicion": None} for index in indices]
    layer = read_json(record_path(out))["layers"][0]["name"]

    def change(found: Any) -> None:
        own = next(each for each in found["layers"] if each["name"] == layer)
        own["stored_columns"]["columns"] = columns

    edit(record_path(out), change)
    edit(out / "int8/report.json", change)
    return str(layer)


def test_stored_columns_match_their_source(beside: Path, source: Path) -> None:
    before = tree(beside)
    verification = verified(beside, source)
    assert failures(verification) == {}
    assert check_of(verification, "sidecars").detail == "42 columns of 14 layers, sorted and as reported"
    assert check_of(verification, "shards").detail.startswith("3 files and 3 with stored columns, ")
    assert check_of(verification, "weights").detail.endswith(", 42 stored columns too")
    assert tree(beside) == before
    record = read_json(record_path(beside))
    assert [file["file"] for file in record["files"]] == [SHARD, SIDECAR]


def test_without_stored_columns_the_report_says_so(out: Path) -> None:
    verification = verified(out)
    assert check_of(verification, "sidecars").detail == "no columns are stored"
    assert check_of(verification, "shards").detail.startswith("3 files, ")


def test_stored_columns_of_a_conv1d_match(tmp_path: Path) -> None:
    source = save_tiny("gpt2", tmp_path / "source")
    convert_storing(source, tmp_path / "out", some_columns)
    assert failures(verified(tmp_path / "out", source)) == {}


@pytest.mark.parametrize("float32", ["direct", "float16"])
def test_stored_columns_of_a_float32_bin_match(float32: Any, tmp_path: Path) -> None:
    source = llama(tmp_path / "source", shards=1, dtype=torch.float32)
    torch.save(read_tensors(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    convert_storing(source, tmp_path / "out", some_columns, ConvertOptions(outliers="none", float32=float32))
    assert failures(verified(tmp_path / "out", source)) == {}


def test_stored_columns_of_divided_rows_match(tmp_path: Path) -> None:
    source = save_by_hand(tmp_path / "source", {f"{QUANTIZED}.weight": torch.randn(2, BLOCK_ELEMENTS + 9).bfloat16()})
    columns = (0, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 8)
    convert_storing(source, tmp_path / "out", lambda decision: stored_at(decision, *columns))
    assert failures(verified(tmp_path / "out", source)) == {}


def test_stored_columns_of_the_other_layout_match(source: Path, tmp_path: Path) -> None:
    convert_storing(
        source, tmp_path / "out", some_columns, ConvertOptions(outliers="none", layout="compressed-tensors")
    )
    assert failures(verified(tmp_path / "out", source)) == {}


@pytest.mark.parametrize("damaged", [1, 14], ids=["one layer", "every layer"])
def test_a_weight_with_non_finite_values_has_no_stored_columns(damaged: int, tmp_path: Path) -> None:
    source = llama(tmp_path / "source", shards=1)
    tensors = read_tensors(source / "model.safetensors")
    quantized = [name for name in tensors if name.endswith("_proj.weight")]
    for name in quantized[:damaged]:
        tensors[name][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert_storing(source, tmp_path / "out", some_columns, ConvertOptions(outliers="none", on_nonfinite="keep"))
    verification = verified(tmp_path / "out", source)
    assert failures(verification) == {}
    left = 14 - damaged
    assert check_of(verification, "sidecars").detail.startswith(f"{3 * left} columns of {left} layers")
    assert (tmp_path / "out/int8/outliers/model.safetensors").exists() == (left > 0)


def test_a_layer_without_stored_columns_has_an_empty_entry(source: Path, tmp_path: Path) -> None:
    convert_storing(
        source, tmp_path / "out", lambda decision: some_columns(decision) if decision.module == QUANTIZED else None
    )
    verification = verified(tmp_path / "out", source)
    assert failures(verification) == {}
    assert check_of(verification, "sidecars").detail.startswith("3 columns of 1 layers")


@pytest.mark.parametrize("tensor", [f"{QUANTIZED}.outlier_cols", f"{QUANTIZED}.outlier_weight"])
def test_a_flipped_bit_of_a_sidecar_is_found_in_its_tensor(tensor: str, beside: Path) -> None:
    file = next(file for file in sorted((beside / "int8/outliers").iterdir()) if tensor in places(file))
    flip(file, places(file)[tensor][1] - 1, bit=7)
    found = failures(verified(beside))
    assert [(name, where) for name, where, _ in found.pop("shards")] == [(f"int8/outliers/{file.name}", tensor)]
    assert found.keys() == ({"sidecars"} if tensor.endswith("cols") else set())


def test_a_changed_header_of_a_sidecar_is_detected(beside: Path) -> None:
    flip(beside / SIDECAR, 30)
    assert (SIDECAR, None) in named(verified(beside))


def test_only_the_source_reveals_a_wrong_column_in_both_record_and_file(beside: Path, source: Path) -> None:
    tensor = next(name for name in places(beside / SIDECAR) if name.endswith("outlier_weight"))
    flip(beside / SIDECAR, places(beside / SIDECAR)[tensor][0] + 2 * (3 * 5 + 1))
    record_as_written(beside, tensor)
    assert verified(beside).passed
    assert failures(verified(beside, source)) == {
        "weights": [(SIDECAR, tensor, "differs from the conversion of the source, first at [5, 1]")]
    }


@pytest.mark.parametrize("damage", ["gone", "short", "long"])
def test_an_incomplete_sidecar_is_named_and_the_rest_compared(damage: str, beside: Path, source: Path) -> None:
    size = (beside / SIDECAR).stat().st_size
    if damage == "gone":
        (beside / SIDECAR).unlink()
        written, compared = "is missing", "is missing"
    else:
        now = size - 1 if damage == "short" else size + 1
        os.truncate(beside / SIDECAR, now)
        written, compared = (
            f"has {now:,} bytes; {size:,} were written",
            f"has {now:,} bytes; the conversion of the source has {size:,}",
        )
    assert failures(verified(beside, source)) == {
        "shards": [(SIDECAR, None, written)],
        "weights": [(SIDECAR, None, compared)],
    }


@pytest.mark.parametrize("conversion", ["out", "beside"])
def test_a_stray_file_among_the_sidecars_is_named(
    conversion: str, original_with_sidecars: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(original_with_sidecars.parent / conversion, tmp_path / "copy"))
    (directory / "int8/outliers").mkdir(exist_ok=True)
    (directory / "int8/outliers/mine.safetensors").write_bytes(b"")
    assert failures(verified(directory)) == {
        "sidecars": [("int8/outliers/mine.safetensors", None, "has no record: it does not belong to this conversion")]
    }


@pytest.mark.parametrize(
    ("indices", "problem"),
    [
        ((5, 4, 9), "its stored columns [5, 4, 9] are not in ascending order"),
        ((4, 4, 9), "its stored columns [4, 4, 9] are not in ascending order"),
        ((1, 4, 5000), "its stored columns [1, 4, 5000] include some outside its"),
        ((1, 4, 9, 11), "has 4 stored columns; the settings allow 3"),
        ((1, 4, 9), ", reported as [1, 4, 9]"),
    ],
)
def test_wrongly_reported_columns_are_named(
    indices: tuple[object, ...], problem: str, beside: Path, source: Path
) -> None:
    layer = change_columns(beside, *indices)
    found = failures(verified(beside, source))["sidecars"]
    assert [each for each in found if (each[1] or "").startswith(layer) and problem in each[2]], found


@pytest.mark.parametrize(
    ("change", "tensor", "problem"),
    [
        (lambda record: record["files"].pop(1), None, f"is missing from the record of {SHARD}"),
        (lambda record: record["files"][1]["tensors"].pop(0), "first", "is missing"),
        (
            lambda record: record["files"][1]["tensors"][0].update(name="x.outlier_cols"),
            "x.outlier_cols",
            "not belong to",
        ),
        (lambda record: record["files"][1]["tensors"][0].update(dtype="F32"), "first", "is F32 [3], not I32 [3]"),
        (lambda record: record["layers"][0].update(stored_columns=None), "layer", "has no entry for stored columns"),
        (lambda record: record["layers"][0]["stored_columns"].update(bytes=1), "layer", "are reported as 1 bytes"),
        (lambda record: record["layers"].pop(0), "layer", "does not belong to an int8 layer"),
    ],
    ids=["sidecar", "tensor gone", "tensor renamed", "dtype", "layer says nothing", "bytes", "layer gone"],
)
def test_a_record_that_does_not_match_its_sidecar_is_named(
    change: Callable[[Any], object], tensor: str | None, problem: str, beside: Path
) -> None:
    record = read_json(record_path(beside))
    where = {"first": record["files"][1]["tensors"][0]["name"], "layer": record["layers"][0]["name"]}.get(tensor or "")
    edit(record_path(beside), change)
    found = failures(verified(beside))["sidecars"]
    assert [
        each
        for each in found
        if each[0] == SIDECAR and (each[1] or "").startswith(where or tensor or "") and problem in each[2]
    ], found


@pytest.mark.parametrize("key", ["columns", "bytes"])
def test_totals_of_stored_columns_in_the_report_are_those_of_the_records(key: str, beside: Path) -> None:
    edit(beside / "int8/report.json", lambda report: report["stored_columns"].update({key: 1}))
    assert [problem.split()[0] for _, _, problem in failures(verified(beside))["report"]] == ["stored_columns"]


# The command


def test_the_command_prints_one_document_and_sets_the_exit_code(
    out: Path, source: Path, model_nursery: Nursery
) -> None:
    good = model_nursery.run("verify", out, "--source", source, "--json", cwd=out.parent)
    assert good.code == 0, good.err
    document = json.loads(good.out)
    assert (document["schema"], document["holds"], document["source"]) == ("int8cli.verification/1", True, "source")
    assert SHARD in good.err
    flip(out / SHARD, (out / SHARD).stat().st_size - 1)
    bad = model_nursery.run("verify", out, cwd=out.parent)
    assert bad.code == 1
    assert SHARD in bad.out
    assert "FAILED: shards." in bad.out
    quiet = model_nursery.run("verify", out, "--quiet", cwd=out.parent)
    assert (quiet.code, quiet.out) == (1, "")
    assert quiet.err.startswith("error: ")
    assert "failed: shards" in quiet.err


def test_the_command_refuses_a_directory_without_a_conversion(source: Path, nursery: Nursery) -> None:
    outcome = nursery.run("verify", source, cwd=source)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    assert "\nhint: " in outcome.err


def test_a_hub_source_is_compared_at_the_revision_that_was_converted(source: Path, tmp_path: Path) -> None:
    (published := Path(shutil.copytree(source, tmp_path / "published"))).joinpath("config.json").unlink()
    with HubStandIn() as hub:
        hub.add_repo("org/model", published)
        env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
        assert run(*CONVERT, "org/model", "-o", "out", "-q", cwd=tmp_path, env=env).code == 0
        hub.move_main("org/model", llama(tmp_path / "later", seed=5))
        outcome = run("verify", "out", "--source", "org/model", cwd=tmp_path, env=env)
        assert outcome.code == 0, outcome.out + outcome.err
    assert "No check failed. Not checked: loads." in outcome.out
    assert not (tmp_path / "out" / "int8" / "incoming").exists()
