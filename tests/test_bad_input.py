"""Broken input: each kind is an error that names the problem, and no file is half-written."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.program import CONVERT, Nursery, Outcome, llama, run, tree, wait_until, write_json

from int8cli.results.units import human_bytes

FIRST, SECOND = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
INDEX = "model.safetensors.index.json"
NOBODY = 65534


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


def assert_refused(outcome: Outcome, *words: str) -> None:
    """An error and, in its place, a hint; no report, no traceback."""
    assert (outcome.code, outcome.out) == (1, "")
    assert "Traceback" not in outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


def weights_in(output: Path) -> set[str]:
    """The files with final names, or names that a loader would read."""
    if not output.exists():
        return set()
    return {name for name in tree(output) if name.endswith((".safetensors", "config.json", ".index.json", "README.md"))}


# Headers


def rewrite_header(path: Path, change: Callable[[dict], dict | str]) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    changed = change(json.loads(data[8 : 8 + size]))
    text = (changed if isinstance(changed, str) else json.dumps(changed)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def first_tensor(header: dict) -> tuple[str, dict]:
    return next((name, entry) for name, entry in header.items() if name != "__metadata__")


def with_changed(key: str, value: Callable[[dict], object]) -> Callable[[dict], dict]:
    def change(header: dict) -> dict:
        _, entry = first_tensor(header)
        entry[key] = value(entry)
        return header

    return change


def with_overlap(header: dict) -> dict:
    """The second tensor begins inside the first."""
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: entry["data_offsets"])
    begin, end = entries[1]["data_offsets"]
    entries[1]["data_offsets"] = [begin - 2, end - 2]
    return header


def twice(header: dict) -> str:
    name, entry = first_tensor(header)
    return json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (with_overlap, "overlap"),
        (with_changed("data_offsets", lambda entry: [entry["data_offsets"][0], 10**15]), "1,000,000,000,000,000"),
        (with_changed("data_offsets", lambda entry: [-2, entry["data_offsets"][1]]), "-2"),
        (with_changed("shape", lambda entry: [entry["shape"][0] + 1, *entry["shape"][1:]]), "span"),
        (with_changed("dtype", lambda entry: "F32"), "F32"),
        (with_changed("dtype", lambda entry: "F17"), "F17"),
        (twice, "twice"),
        (lambda header: "{", "JSON"),
        (lambda header: "[]", ""),
    ],
    ids=["overlap", "beyond", "negative", "shape", "dtype", "unknown dtype", "duplicate", "no json", "no object"],
)
def test_a_false_header_is_refused(
    change: Callable[[dict], dict | str], word: str, model: Path, nursery: Nursery
) -> None:
    rewrite_header(model / SECOND, change)
    outcome = nursery.run(*CONVERT, model, cwd=model.parent)
    assert_refused(outcome, SECOND, word)
    assert not (model.parent / "model-int8").exists()


@pytest.mark.parametrize("claimed", [100_000_001, 2**63, 1_000_000], ids=["over 100 MB", "absurd", "over the file"])
def test_a_header_that_is_too_long_is_refused(claimed: int, model: Path, nursery: Nursery) -> None:
    with (model / FIRST).open("r+b") as file:
        file.write(claimed.to_bytes(8, "little"))
    assert_refused(nursery.run(*CONVERT, model, cwd=model.parent), FIRST, f"{claimed:,}", "hint:")
    assert not (model.parent / "model-int8").exists()


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_shard_is_refused(size: int, model: Path, nursery: Nursery) -> None:
    os.truncate(model / FIRST, size if size >= 0 else (model / FIRST).stat().st_size + size)
    assert_refused(nursery.run(*CONVERT, model, cwd=model.parent), FIRST, "hint:")
    assert not (model.parent / "model-int8").exists()


# Indexes


@pytest.mark.parametrize(
    ("name", "shard", "words"),
    [
        ("model.norm.weight", "missing.safetensors", ["'missing.safetensors'", "missing"]),
        ("no.such.tensor", FIRST, ["'no.such.tensor'"]),
        ("model.norm.weight", "../outside.safetensors", ["outside the checkpoint", "../outside.safetensors"]),
        ("model.norm.weight", "/outside.safetensors", ["outside the checkpoint", "/outside.safetensors"]),
        ("model.norm.weight", "sub/../../outside.safetensors", ["outside the checkpoint"]),
        ("model.norm.weight", "config.json", ["config.json"]),
        ("model.norm.weight", 7, ["7"]),
    ],
)
def test_an_index_that_names_a_missing_file_is_refused(
    name: str, shard: object, words: list[str], model: Path, nursery: Nursery
) -> None:
    save_file({"model.norm.weight": torch.zeros(64)}, model.parent / "outside.safetensors")
    index = json.loads((model / INDEX).read_text())
    index["weight_map"][name] = shard
    write_json(model / INDEX, index)
    assert_refused(nursery.run(*CONVERT, model, cwd=model.parent), INDEX, *words)
    assert not (model.parent / "model-int8").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\0"])
def test_an_invalid_index_is_refused(text: str, model: Path, nursery: Nursery) -> None:
    (model / INDEX).write_text(text)
    assert_refused(nursery.run(*CONVERT, model, cwd=model.parent), INDEX)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_a_broken_config_is_refused(text: str, model: Path, nursery: Nursery) -> None:
    (model / "config.json").write_text(text, encoding="latin-1")
    assert_refused(nursery.run(*CONVERT, model, cwd=model.parent), "config.json")
    assert not (model.parent / "model-int8").exists()


# Values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_invalid_number_is_named_with_its_place(value: float, model: Path, nursery: Nursery) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    index = json.loads((model / INDEX).read_text())
    shard = index["weight_map"][name]
    tensors = load_file(model / shard)
    tensors[name][5, 7] = value
    save_file(tensors, model / shard, metadata={"format": "pt"})
    outcome = nursery.run(*CONVERT, model, cwd=model.parent)
    assert_refused(outcome, f"{shard}: {name} contains {value} at row 5, column 7", "--on-nonfinite keep")
    output = model.parent / "model-int8"
    assert shard not in weights_in(output)
    assert "config.json" not in weights_in(output)
    assert not any((output / "int8/partial").glob("*"))
    # The option that the hint names resumes in the same directory.
    kept = nursery.run(*CONVERT, model, "--on-nonfinite", "keep", cwd=model.parent)
    assert kept.code == 0, kept.err
    assert load_file(output / shard)[name].dtype == torch.bfloat16


# Pickles


class Touch:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_nothing_in_a_pickle_is_executed(form: str, model: Path, nursery: Nursery, tmp_path: Path) -> None:
    directory, trap = tmp_path / "pickled", tmp_path / "sprung"
    directory.mkdir()
    shutil.copy(model / "config.json", directory)
    content = {"model.norm.weight": torch.zeros(4), "evil": Touch(trap)}
    if form == "bare":
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, directory / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    assert_refused(nursery.run(*CONVERT, directory, cwd=tmp_path), "pytorch_model.bin", "hint:")
    assert not trap.exists()
    assert not (tmp_path / "pickled-int8").exists()


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {"model": {"x": torch.zeros(2)}}, torch.zeros(3)])
def test_a_pickle_of_more_than_tensors_is_refused(content: object, nursery: Nursery, tmp_path: Path) -> None:
    directory = tmp_path / "pickled"
    directory.mkdir()
    torch.save(content, directory / "pytorch_model.bin")
    assert_refused(nursery.run(*CONVERT, directory, cwd=tmp_path), "pytorch_model.bin", "hint:")


def test_a_truncated_archive_is_refused(nursery: Nursery, tmp_path: Path) -> None:
    directory = tmp_path / "pickled"
    directory.mkdir()
    path = directory / "pytorch_model.bin"
    torch.save({"x.weight": torch.zeros(64, 64)}, path)
    os.truncate(path, path.stat().st_size - 100)
    assert_refused(nursery.run(*CONVERT, directory, cwd=tmp_path), "pytorch_model.bin", "hint:")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.txt", "no pickle")
    assert_refused(nursery.run(*CONVERT, directory, cwd=tmp_path), "pytorch_model.bin")


# Directories that are not models


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["the directory is empty"]),
        ({"config.json": "{}"}, ["no weights"]),
        ({"adapter_model.safetensors": "x", "adapter_config.json": "{}"}, ["adapter", "merge_and_unload"]),
        ({"model.Q4_K.gguf": "GGUF"}, ["model.Q4_K.gguf"]),
        ({"flax_model.msgpack": "x", "tf_model.h5": "x"}, ["flax_model.msgpack"]),
    ],
)
def test_a_directory_without_a_model_is_an_error_that_lists_its_files(
    files: dict[str, str], words: list[str], nursery: Nursery, tmp_path: Path
) -> None:
    directory = tmp_path / "thing"
    directory.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)
    assert_refused(nursery.run(*CONVERT, directory, cwd=tmp_path), "hint:", *words)
    assert not (tmp_path / "thing-int8").exists()


def test_a_conversion_is_not_converted_again(model: Path, nursery: Nursery) -> None:
    assert nursery.run(*CONVERT, model, "-o", "once", "-q", cwd=model.parent).code == 0
    outcome = nursery.run(*CONVERT, "once", "-o", "twice", cwd=model.parent)
    assert_refused(outcome, "already int8", "hint:")
    assert not (model.parent / "twice").exists()


@pytest.mark.parametrize("name", ["nothing", "./nothing", "../nothing/", "model.safetensors", "mdoel"])
def test_a_missing_model_is_an_error(name: str, model: Path, nursery: Nursery) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(model.parent / "hf")}
    assert_refused(nursery.run(*CONVERT, name, cwd=model.parent, env=environment), "hint:")


def test_a_revision_of_a_directory_is_refused(model: Path, nursery: Nursery) -> None:
    assert_refused(nursery.run(*CONVERT, model, "--revision", "main", cwd=model.parent), "revision", "hint:")


def model_for_all(place: Path) -> Path:
    """A model that every user can read, whatever the umask is."""
    model = llama(place / "model")
    for path in model.iterdir():
        path.chmod(0o644)
    model.chmod(0o755)
    return model


def subject_to_permissions(place: Path) -> int | None:
    """The user to run as: nobody in place of root, to whom no permission applies; otherwise None, the present one."""
    if os.geteuid() != 0:
        return None
    place.chmod(0o755)
    try:
        reached = subprocess.run(["test", "-x", place], user=NOBODY, extra_groups=[]).returncode == 0
    except OSError:
        reached = False
    if not reached:
        pytest.skip("root cannot become another user here, or that user cannot reach the directory of the test")
    return NOBODY


@pytest.mark.parametrize("file", [FIRST, "config.json", "tokenizer_config.json", INDEX])
def test_a_file_without_read_permission_is_an_error(file: str, nursery: Nursery) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = model_for_all(Path(directory))
        (model / file).chmod(0)
        user = subject_to_permissions(Path(directory))
        Path(directory).chmod(0o777)
        outcome = nursery.run(*CONVERT, model, cwd=Path(directory), user=user)
        assert_refused(outcome, f"{file} cannot be read: Permission denied", "hint:")
        assert "config.json" not in weights_in(Path(directory) / "model-int8")


def test_a_directory_without_write_permission_is_an_error(nursery: Nursery) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = model_for_all(Path(directory))
        user = subject_to_permissions(Path(directory))
        Path(directory).chmod(0o555)
        outcome = nursery.run(*CONVERT, model, cwd=Path(directory), user=user)
        Path(directory).chmod(0o755)
        assert_refused(outcome, "model-int8: cannot be written (Permission denied)", "can write to")
        assert not (Path(directory) / "model-int8").exists()


def test_an_output_that_cannot_be_accessed_is_an_error(nursery: Nursery) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = model_for_all(Path(directory))
        user = subject_to_permissions(Path(directory))
        closed = Path(directory) / "closed"
        closed.mkdir(0o000)
        line = (*CONVERT, model, "--workers", "2", "-o", closed / "out")
        outcome = nursery.run(*line, cwd=Path(directory), user=user)
        assert_refused(outcome, "cannot be written (Permission denied)", "hint:")


# Outputs


@pytest.mark.parametrize("output", ["file", "file/below", "/proc/nowhere"])
def test_an_output_that_cannot_be_written_is_an_error(output: str, model: Path, nursery: Nursery) -> None:
    (model.parent / "file").write_text("a regular file")
    assert_refused(nursery.run(*CONVERT, model, "-o", output, cwd=model.parent), output, "can write to")
    assert (model.parent / "file").read_text() == "a regular file"


DISK_BYTES = 48 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system that is small enough to fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path) -> Path:
    """A file that uses all free space."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler


def test_too_little_disk_space_is_an_error_before_the_first_byte(
    small_disk: Path, model: Path, nursery: Nursery
) -> None:
    fill(small_disk).rename(small_disk / "other")
    os.truncate(small_disk / "other", (small_disk / "other").stat().st_size - 65_536)
    planned = nursery.run(*CONVERT, model, "-o", small_disk / "out", "--dry-run", "--json", cwd=model.parent)
    (disk,) = json.loads(planned.out)["needs"]["disks"]
    assert disk["bytes"] > json.loads(planned.out)["output_bytes"]  # tokenizer, records and report take room too
    outcome = nursery.run(*CONVERT, model, "-o", small_disk / "out", cwd=model.parent)
    assert_refused(outcome, f"needs {human_bytes(disk['bytes'])}, {human_bytes(disk['free_bytes'])} free", "hint:")
    assert not (small_disk / "out/int8").exists()
    dry = nursery.run(*CONVERT, model, "-o", small_disk / "out", "--dry-run", cwd=model.parent)
    assert dry.code == 0
    assert "does not fit" in dry.out


def test_a_full_disk_is_reported(small_disk: Path, model: Path, nursery: Nursery) -> None:
    filler = fill(small_disk)
    assert_refused(nursery.run(*CONVERT, model, "-o", small_disk / "out", cwd=model.parent), "out", "hint:")
    assert not weights_in(small_disk / "out")
    filler.unlink()
    assert nursery.run(*CONVERT, model, "-o", small_disk / "out", cwd=model.parent).code == 0


def test_a_disk_that_fills_up_is_reported_and_the_next_run_resumes(
    small_disk: Path, nursery: Nursery, tmp_path: Path
) -> None:
    model = llama(tmp_path / "model", layers=4, hidden=768, intermediate=2048, vocabulary=1024, shards=6)
    assert nursery.run(*CONVERT, model, "-o", "reference", "-q", cwd=tmp_path).code == 0
    reference = tree(tmp_path / "reference")
    output = small_disk / "out"
    child = nursery.start(*CONVERT, model, "-o", output, cwd=tmp_path)
    wait_until(lambda: list(output.glob("int8/records/[!.]*.json")))
    child.signal(signal.SIGSTOP)
    filler = fill(small_disk)
    child.signal(signal.SIGCONT)
    assert_refused(child.wait(), "not enough disk space", "hint:", "run the same command again")
    assert "config.json" not in weights_in(output)
    assert all(tree(output)[name] == reference[name] for name in weights_in(output))
    filler.unlink()
    outcome = nursery.run(*CONVERT, model, "-o", output, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert "shards already converted" in outcome.err
    assert tree(output) == reference


def test_a_file_larger_than_the_system_allows_is_an_error(model: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    outcome = run(*CONVERT, model, cwd=model.parent, preexec_fn=limit)
    assert_refused(outcome, "File too large", "hint:")
    assert not {name for name in weights_in(model.parent / "model-int8") if name.endswith(".safetensors")}
    assert run(*CONVERT, model, "-q", cwd=model.parent).code == 0
