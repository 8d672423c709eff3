"""No name leads outside an output, and no two inputs share an output."""

import os
from pathlib import Path

import pytest

from int8cli.checkpoint.output_names import is_output_name, refuse_shared_outputs, remove_files
from int8cli.errors import IndexFileError, OutputError
from int8cli.planning.output_files import output_file_names

OUTSIDE = ("", "/a", "..", "../a", "a/../../b", "a/..", "./a", "a/.", "a//b", "a/", "a\\b", "a\0b")


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_outside_are_refused(name: str, tmp_path: Path) -> None:
    assert not is_output_name(name)
    with pytest.raises(OutputError, match="nothing was removed"):
        remove_files(tmp_path, [name])


def test_only_the_named_files_are_removed(tmp_path: Path) -> None:
    for name in ("a", "b", "sub/c", "sub/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_files(tmp_path, ["a", "sub/c", "gone", "no/such/directory"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "d", "sub"]


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    output.mkdir()
    (elsewhere / "f").write_text("precious")
    (output / "first").touch()
    (output / "ln").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="is a link"):
        remove_files(output, ["first", "ln/f"])
    assert (elsewhere / "f").read_text() == "precious"
    assert (output / "first").exists()


def test_a_link_with_the_name_of_a_file_is_removed_but_not_its_target(tmp_path: Path) -> None:
    precious, output = tmp_path / "precious", tmp_path / "out"
    output.mkdir()
    precious.write_text("precious")
    (output / "f").symlink_to(precious)
    remove_files(output, ["f"])
    assert precious.read_text() == "precious"
    assert not os.path.lexists(output / "f")


def test_a_directory_with_the_name_of_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(OutputError):
        remove_files(tmp_path, ["f"])


@pytest.mark.parametrize(
    "shards",
    [
        ["a.bin", "a.pt"],
        ["a.bin", "b.bin", "a.pth"],
        ["A.bin", "a.bin"],
        ["caf\u00e9.bin", "cafe\u0301.bin"],
        ["d/a.bin", "d/a.pt"],
        ["a.bin", "a.safetensors/b.bin"],
    ],
)
def test_two_shards_with_one_output_are_refused(shards: list[str]) -> None:
    with pytest.raises(IndexFileError, match="would both be written to"):
        output_file_names(shards)


def test_a_copied_file_with_the_name_of_an_output_is_refused() -> None:
    with pytest.raises(IndexFileError, match="would both be written to"):
        output_file_names(["2_Dense/model.bin", "b.bin"], ["2_Dense/model.safetensors"])


@pytest.mark.parametrize("directory", ["int8", "INT8"])
def test_a_shard_in_our_own_directory_is_refused(directory: str) -> None:
    with pytest.raises(IndexFileError, match="that directory is for files of int8cli"):
        output_file_names([f"{directory}/outliers/a.safetensors", "b.safetensors"])


def test_separate_shards_keep_their_names() -> None:
    names = {"a.bin": "a.safetensors", "d/a.bin": "d/a.safetensors", "int8.bin": "int8.safetensors"}
    assert output_file_names(list(names)) == names
    refuse_shared_outputs(names, ["LICENSE", "license"])
