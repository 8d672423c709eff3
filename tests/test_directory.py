"""Checkpoints on this machine, and how an argument is interpreted."""

import os
from pathlib import Path

import pytest

from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.locate import open_source
from int8cli.errors import CorruptShardError, IndexFileError, Int8cliError, ModelNotFoundError, SourceError


def write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def open_here(model: str, tmp_path: Path, revision: str | None = None):
    return open_source(model, revision=revision, download_dir=tmp_path / "incoming")


def test_a_directory_lists_its_files_recursively_sorted_and_without_hidden_ones(tmp_path):
    root = write(tmp_path / "m", "model.safetensors", "config.json", "onnx/a.json", ".git/HEAD", ".hidden", "a/.b/c")
    assert DirectorySource(root).list_files() == ("config.json", "model.safetensors", "onnx/a.json")


def test_a_directory_is_called_by_its_own_name(tmp_path, monkeypatch):
    root = write(tmp_path / "bloom-560m", "config.json")
    monkeypatch.chdir(root)
    for model in (str(root), ".", "./", "../bloom-560m"):
        identity = open_here(model, tmp_path).identity
        assert (identity.name, identity.revision, identity.on_hub) == ("bloom-560m", None, False)


def test_a_link_to_a_directory_has_its_own_name(tmp_path):
    write(tmp_path / "0a1b2c", "config.json")
    (tmp_path / "mine").symlink_to(tmp_path / "0a1b2c")
    source = DirectorySource(tmp_path / "mine")
    assert source.identity.name == "mine"
    assert source.list_files() == ("config.json",)


def test_a_single_file_comes_with_its_companions_but_no_other_weights(tmp_path):
    root = write(
        tmp_path,
        *("a.safetensors", "b.safetensors", "pytorch_model.bin", "model.safetensors.index.json"),
        *("config.json", "tokenizer.json", ".cache", "deeper/config.json"),
    )
    source = DirectorySource(root / "a.safetensors")
    assert source.list_files() == ("a.safetensors", "config.json", "tokenizer.json")
    assert source.identity.name == "a.safetensors"


def test_a_local_file_is_read_in_place_and_not_removed(tmp_path):
    source = DirectorySource(write(tmp_path, "model.safetensors"))
    assert source.size_bytes("model.safetensors") == len("model.safetensors")
    with source.open("model.safetensors") as file:
        file.seek(6)
        assert file.read() == b"safetensors"
    source.prefetch("model.safetensors")
    with source.fetch("model.safetensors") as local:
        assert (local.path, local.sha256) == (tmp_path / "model.safetensors", None)
    source.close()
    assert local.path.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "a//b", "", "a/", "a\0b"])
def test_no_name_leads_out_of_the_directory(tmp_path, name):
    write(tmp_path, "secret", "m/a/b")
    source = DirectorySource(tmp_path / "m")
    for ask in (source.size_bytes, source.open, lambda name: source.fetch(name).__enter__()):
        with pytest.raises(IndexFileError):
            ask(name)


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    write(tmp_path, "blobs/abc", "snapshots/1/config.json")
    (tmp_path / "snapshots/1/model.safetensors").symlink_to("../../blobs/abc")
    source = DirectorySource(tmp_path / "snapshots/1")
    assert source.list_files() == ("config.json", "model.safetensors")
    with source.open("model.safetensors") as file:
        assert file.read() == b"blobs/abc"


def test_a_broken_link_is_a_file_that_is_missing(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("gone")
    source = DirectorySource(tmp_path)
    assert source.list_files() == ("model.safetensors",)
    with pytest.raises(ModelNotFoundError, match=r"'model\.safetensors' is a link to gone, which does not exist"):
        source.size_bytes("model.safetensors")


def in_place_of(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"loop": path.name, "nowhere": "gone", "device": "/dev/zero"}[kind])


@pytest.mark.parametrize("alone", [False, True], ids=["directory", "file"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "loop", "nowhere", "device"])
def test_what_lies_in_the_place_of_a_file_is_no_absent_file(tmp_path, kind, alone):
    """Otherwise a conversion would be finished without a tokenizer whose link leads nowhere."""
    root = write(tmp_path / "m", "model.safetensors")
    in_place_of(root / "tokenizer.json", kind)
    source = DirectorySource(root / "model.safetensors" if alone else root)
    assert "tokenizer.json" in source.list_files()
    with pytest.raises(Int8cliError, match=r"tokenizer\.json") as refused, source.fetch("tokenizer.json"):
        pass
    assert refused.value.hint


def test_a_local_copy_is_never_discarded(tmp_path):
    source = DirectorySource(write(tmp_path, "model.safetensors"))
    with pytest.raises(CorruptShardError) as caught:
        source.discard("model.safetensors")
    assert str(tmp_path / "model.safetensors") in caught.value.hint
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    "model",
    ["./nope", "~/nope-of-int8cli", "/nope", "a/b/c", "nope/", "nope.safetensors", "", "https://huggingface.co/a/b"],
)
def test_a_path_is_never_looked_up_on_the_hub(tmp_path, monkeypatch, model):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # a request would fail otherwise
    with pytest.raises(ModelNotFoundError, match="no such file or directory") as caught:
        open_here(model, tmp_path)
    assert caught.value.hint


def test_a_misspelt_path_gets_a_suggestion(tmp_path):
    write(tmp_path, "bloom-560m/config.json", "other/config.json")
    with pytest.raises(ModelNotFoundError) as caught:
        open_here(f"{tmp_path}/blom-560m", tmp_path)
    assert f"{tmp_path}/bloom-560m" in caught.value.hint


def test_a_revision_of_a_local_model_is_refused(tmp_path):
    write(tmp_path, "m/config.json")
    with pytest.raises(SourceError, match="v1"):
        open_here(f"{tmp_path}/m", tmp_path, revision="v1")
