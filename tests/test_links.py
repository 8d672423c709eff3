"""Planted links in an output or a source never lead outside."""

import dataclasses
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.hub_stand_in import HubStandIn
from support.program import llama, tree

from int8cli import ConvertOptions, convert, verify
from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.hub import HubOptions, HubSource
from int8cli.checkpoint.lock import is_held
from int8cli.checkpoint.own_files import name_aside, opened_directory, remove_tree
from int8cli.checkpoint.writer import write_file
from int8cli.commands.options import VerifyOptions
from int8cli.conversion.announce import TASK
from int8cli.errors import Int8cliError, OutputError, SavedStateError, SourceError
from int8cli.model.saved_states import SavedStates
from int8cli.progress import SilentProgress

PLAIN = ConvertOptions(outliers="none", workers=1)
FIRST = "model-00001-of-00003"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory that must not be touched, with a file and an empty directory."""
    directory = tmp_path / "elsewhere"
    (directory / "empty").mkdir(parents=True)
    (directory / "precious").write_text("mine")
    return directory


def is_untouched(elsewhere: Path) -> bool:
    return tree(elsewhere) == {"empty/": b"", "precious": b"mine"}


# In an output


@pytest.mark.parametrize("plant", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize(
    "name",
    [
        ".LICENSE.partial",
        ".config.json.partial",
        "int8/.conversion.json.partial",
        "int8/.report.json.partial",
        f"int8/records/.{FIRST}.json.partial",
    ],
)
def test_a_link_with_the_name_of_a_new_file_is_replaced(
    name: str, plant: str, model: Path, elsewhere: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    (output / name).parent.mkdir(parents=True)
    getattr(output / name, plant)(elsewhere / "precious")
    convert(model, output, PLAIN)
    assert is_untouched(elsewhere)
    assert not os.path.lexists(output / name)
    assert verify(output, VerifyOptions()).passed


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["records", "partial", "outliers", "incoming", "calibration"])
def test_a_link_with_the_name_of_one_of_our_directories_is_refused(
    name: str, overwrite: bool, model: Path, elsewhere: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    if overwrite:
        convert(model, output, PLAIN)
        (output / "int8" / name).exists() and (output / "int8" / name).rename(tmp_path / "aside")
    (output / "int8").mkdir(parents=True, exist_ok=True)
    (output / "int8" / name).symlink_to(elsewhere)
    with pytest.raises(OutputError, match=f"int8/{name} is a link"):
        convert(model, output, ConvertOptions(outliers="none", workers=1, overwrite=overwrite))
    assert is_untouched(elsewhere)


def test_a_link_as_our_own_directory_is_refused(model: Path, elsewhere: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "int8").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="int8 is a link"):
        convert(model, output, PLAIN)
    assert is_untouched(elsewhere)


def test_a_copied_file_is_not_written_below_a_link(elsewhere: Path, tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    output = tmp_path / "out"
    output.mkdir()
    (output / "additional_chat_templates").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="is a link"):
        convert(model, output, PLAIN)
    assert is_untouched(elsewhere)


def test_the_output_itself_may_be_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    convert(model, tmp_path / "out", PLAIN)
    assert verify(tmp_path / "disk", VerifyOptions()).passed


def test_verify_removes_nothing_behind_a_link(model: Path, elsewhere: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    convert(model, output, PLAIN)
    (output / "int8/incoming").symlink_to(elsewhere)
    assert verify(output, VerifyOptions(source=model)).passed
    assert is_untouched(elsewhere)


def test_a_tree_is_removed_but_not_the_targets_of_its_links(elsewhere: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    (ours / "deep").mkdir(parents=True)
    (ours / "deep" / "link").symlink_to(elsewhere)
    remove_tree(ours, tmp_path)
    assert not ours.exists()
    (tmp_path / "link").symlink_to(elsewhere)
    remove_tree(tmp_path / "link", tmp_path)
    remove_tree(tmp_path / "link" / "empty", tmp_path)
    assert is_untouched(elsewhere)


def test_the_state_between_blocks_is_not_written_through_a_link(elsewhere: Path, tmp_path: Path) -> None:
    states = SavedStates(tmp_path / "blocks", {"run": 1})
    path = tmp_path / "blocks" / "0@1" / "0.pt"
    path.parent.mkdir(parents=True)
    path.symlink_to(elsewhere / "precious")
    states.put("layers", "0", 1, 0, [1.0, 2.0])
    states.finish("layers", "0", 1)
    assert states.get("layers", 0) == [1.0, 2.0]
    states.close()
    assert is_untouched(elsewhere)


class SwapsAfter(SilentProgress):
    """Once a shard is converted, puts a link in the place of a directory."""

    def __init__(self, directory: Path, elsewhere: Path) -> None:
        self._directory, self._elsewhere = directory, elsewhere

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
        if task == TASK and part is not None and not self._directory.is_symlink():
            swap(self._directory, self._elsewhere)


def swap(directory: Path, elsewhere: Path) -> None:
    directory.rename(directory.with_name("aside"))
    directory.symlink_to(elsewhere)


@pytest.mark.parametrize("name", ["int8/calibration", "int8/calibration/suspects", "int8"])
def test_a_link_that_comes_during_a_run_is_not_followed(
    name: str, model: Path, elsewhere: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = ConvertOptions(outliers="weights", workers=1)
    with pytest.raises(OutputError, match="is a link"):
        convert(model, output, options, progress=SwapsAfter(output / name, elsewhere))
    assert is_untouched(elsewhere)


@pytest.mark.parametrize("name", ["int8/incoming", "int8"])
def test_a_link_that_comes_during_a_download_is_not_followed(
    name: str, model: Path, elsewhere: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with HubStandIn() as hub:
        hub.add_repo("org/model", model)
        options = HubOptions(output / "int8/incoming", endpoint=hub.endpoint, download_below=output)
        source = HubSource("org/model", None, options)
        with source.fetch("LICENSE"):
            swap(output / name, elsewhere)
            with pytest.raises(OutputError, match="is a link"), source.fetch(f"{FIRST}.safetensors"):
                pass
            (output / name).unlink()
            (output / name).with_name("aside").rename(output / name)
        source.close()
    assert is_untouched(elsewhere)
    assert not (output / "int8/incoming").exists()


def test_the_lock_of_the_state_between_blocks_is_made_below_no_link(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8/calibration").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="is a link"):
        SavedStates(tmp_path / "int8/calibration/blocks", {"run": 1}, tmp_path)
    assert is_untouched(elsewhere)


# Long names


@pytest.mark.parametrize("length", [240, 246, 247, 255])
def test_a_file_of_any_name_is_written(length: int, tmp_path: Path) -> None:
    name = "n" * length
    write_file(tmp_path / name, b"data")
    assert tree(tmp_path) == {name: b"data"}


@pytest.mark.parametrize("length", [237, 250, 255])
def test_a_file_with_a_long_name_is_copied(length: int, tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    name = "n" * (length - 4) + ".txt"
    (model / name).write_text("words")
    convert(model, tmp_path / "out", PLAIN)
    assert (tmp_path / "out" / name).read_text() == "words"


@pytest.mark.parametrize("length", [244, 255])
def test_shards_with_long_names_are_converted(length: int, tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    names = {path.name: f"{place}{'n' * (length - 13)}.safetensors" for place, path in enumerate(model.glob("*-of-*"))}
    index = model / "model.safetensors.index.json"
    text = index.read_text()
    for old, new in names.items():
        (model / old).rename(model / new)
        text = text.replace(old, new)
    index.write_text(text)
    convert(model, tmp_path / "out", ConvertOptions(outliers="weights", workers=1))
    assert verify(tmp_path / "out", VerifyOptions()).passed


@pytest.mark.parametrize("name", ["ä" * 127, "n" * 255])
def test_temporary_names_are_valid_on_every_disk(name: str) -> None:
    aside = name_aside(name, prefix=".", suffix=".partial")
    assert len(os.fsencode(aside)) <= 255
    assert aside != name_aside(f"{name[:-1]}x", prefix=".", suffix=".partial")


# In a source


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors.index.json"])
def test_a_link_to_a_file_outside_the_source_is_refused(name: str, elsewhere: Path, tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(elsewhere / "precious")
    with pytest.raises(SourceError, match=f"{name} is a link to .*precious, outside model"):
        convert(model, tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()


def test_a_link_within_the_source_is_followed(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    (model / "tokenizer.json").rename(model / "real.json") if (model / "tokenizer.json").exists() else (
        model / "real.json"
    ).write_text("{}")
    (model / "tokenizer.json").symlink_to("real.json")
    convert(model, tmp_path / "out", PLAIN)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (model / "real.json").read_bytes()
    assert not (tmp_path / "out/tokenizer.json").is_symlink()


def test_shards_may_be_on_another_disk(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    (tmp_path / "disk").mkdir()
    for shard in model.glob("*.safetensors"):
        shard.rename(tmp_path / "disk" / shard.name)
        shard.symlink_to(tmp_path / "disk" / shard.name)
    convert(model, tmp_path / "out", PLAIN)
    assert verify(tmp_path / "out", VerifyOptions(source=model)).passed


def snapshot(root: Path) -> Path:
    """A repository's snapshot as the Hub cache has it: links to blobs, one of which is a link into a shared store."""
    model = llama(root / "plain")
    repository = root / "cache" / "models--org--tiny"
    found = repository / "snapshots" / "0a1b"
    (repository / "blobs").mkdir(parents=True)
    (root / "store").mkdir()
    for number, path in enumerate(sorted(each for each in model.rglob("*") if each.is_file())):
        blob = repository / "blobs" / f"{number:040x}"
        if path.name == "config.json":
            path.rename(root / "store" / "shared")
            blob.symlink_to(root / "store" / "shared")
        else:
            path.rename(blob)
        link = found / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return found


def test_a_snapshot_in_the_hub_cache_is_converted(tmp_path: Path) -> None:
    found = snapshot(tmp_path)
    convert(found, tmp_path / "out", PLAIN)
    convert(llama(tmp_path / "again"), tmp_path / "reference", PLAIN)
    assert (tmp_path / "out/LICENSE").read_bytes() == (tmp_path / "reference/LICENSE").read_bytes()
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "reference/config.json").read_bytes()


def test_a_snapshot_cannot_use_the_blobs_of_another_repository(tmp_path: Path) -> None:
    found = snapshot(tmp_path)
    other = tmp_path / "cache" / "models--org--private" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("{}")
    (found / "tokenizer.json").unlink(missing_ok=True)
    (found / "tokenizer.json").symlink_to("../../../models--org--private/blobs/0")
    source = DirectorySource(found)
    with pytest.raises(SourceError, match="outside"):
        source.open("tokenizer.json")


def test_no_directory_outside_is_opened_or_removed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    outside = tmp_path / "out/../elsewhere"
    with pytest.raises(OutputError, match="is not inside"), opened_directory(outside, tmp_path / "out"):
        pass
    with pytest.raises(OutputError, match="is not inside"):
        remove_tree(outside, tmp_path / "out")
    assert (tmp_path / "elsewhere").is_dir()


# Pipes: to open one waits for its other end, which never comes


@pytest.mark.parametrize("name", ["partial", "incoming", "calibration", "parts", "uploads", "records"])
def test_a_pipe_in_the_place_of_a_directory_of_ours_ends_no_run(name: str, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    convert(model, output, PLAIN)
    right = tree(output)
    pipe = output / "int8" / name
    shutil.rmtree(pipe, ignore_errors=True)
    os.mkfifo(pipe)
    for options in (PLAIN, dataclasses.replace(PLAIN, part=(1, 1))):
        with suppress(Int8cliError):
            convert(model, output, options)
    pipe.unlink()
    convert(model, output, dataclasses.replace(PLAIN, overwrite=True))
    assert tree(output) == right


def test_a_pipe_in_the_place_of_our_directory_is_an_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    os.mkfifo(tmp_path / "output/int8")
    for options in (PLAIN, dataclasses.replace(PLAIN, part=(1, 1)), dataclasses.replace(PLAIN, overwrite=True)):
        with pytest.raises(OutputError):
            convert(model, tmp_path / "output", options)


def test_a_pipe_in_the_place_of_a_saved_state_is_an_error(tmp_path: Path) -> None:
    directory = tmp_path / "blocks"
    states = SavedStates(directory, {"run": 1})
    states.put("layers", "0", 1, 0, {"hidden": torch.ones(2)})
    states.finish("layers", "0", 1)
    (saved,) = directory.rglob("*.pt")
    saved.unlink()
    os.mkfifo(saved)
    with pytest.raises(SavedStateError, match="not a regular file"):
        states.get("layers", 0)
    states.close()


def test_a_pipe_is_no_part(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert not is_held(tmp_path / "pipe")
