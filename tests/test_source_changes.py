"""A local source that changes while it is read: an error that names the file, and no record."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.program import llama, tree

from int8cli import ConvertOptions, convert, verify
from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.reader import FileReader
from int8cli.checkpoint.writer import copy_file
from int8cli.commands.options import VerifyOptions
from int8cli.conversion.announce import TASK
from int8cli.errors import CorruptShardError
from int8cli.progress import SilentProgress

PLAIN = ConvertOptions(outliers="none", workers=1)
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


def write_inside(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(64))


def replace(path: Path) -> None:
    (path.parent / "new").write_bytes(path.read_bytes())
    (path.parent / "new").rename(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


def write_inside_and_put_the_time_back(path: Path) -> None:
    before = path.stat()
    write_inside(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [write_inside, grow, replace, cut, write_inside_and_put_the_time_back]


class Saboteur(SilentProgress):
    """A progress that changes a file once some of a shard was read; with `finished`, once some shard is recorded."""

    def __init__(self, shard: str, change: Callable[[], None], *, finished: bool = False) -> None:
        self._shard, self._change, self._finished, self._done = shard, change, finished, False

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
        if task == TASK and part == self._shard and amount and not self._finished:
            self._change_once()

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
        if task == TASK and part is not None and self._finished:
            self._change_once()

    def _change_once(self) -> None:
        if not self._done:
            self._done = True
            self._change()


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_while_it_is_converted_is_not_recorded(
    change: Callable[[Path], None], model: Path, tmp_path: Path
) -> None:
    saboteur = Saboteur(SECOND, lambda: change(model / SECOND))
    with pytest.raises(CorruptShardError, match=SECOND):
        convert(model, tmp_path / "out", PLAIN, progress=saboteur)
    standing = tree(tmp_path / "out")
    assert SECOND not in standing
    assert "int8/records/model-00002-of-00003.json" not in standing
    assert "int8/records/model-00001-of-00003.json" in standing
    assert "config.json" not in standing


@pytest.mark.parametrize("change", [write_inside, grow])
def test_a_shard_that_changes_after_planning_is_not_converted(
    change: Callable[[Path], None], model: Path, tmp_path: Path
) -> None:
    """The second shard changes during the conversion of the first, after its header has been read."""
    saboteur = Saboteur("model-00001-of-00003.safetensors", lambda: change(model / SECOND))
    with pytest.raises(CorruptShardError, match=f"{SECOND}: changed"):
        convert(model, tmp_path / "out", PLAIN, progress=saboteur)
    assert SECOND not in tree(tmp_path / "out")


def test_a_change_does_not_prevent_another_run(model: Path, tmp_path: Path) -> None:
    saboteur = Saboteur(SECOND, lambda: os.utime(model / SECOND))
    with pytest.raises(CorruptShardError):
        convert(model, tmp_path / "out", PLAIN, progress=saboteur)
    convert(model, tmp_path / "out", PLAIN)
    assert verify(tmp_path / "out", VerifyOptions(source=model)).passed


def test_a_run_with_workers_detects_a_change(model: Path, tmp_path: Path) -> None:
    third = "model-00003-of-00003.safetensors"
    saboteur = Saboteur(third, lambda: write_inside(model / third), finished=True)
    with pytest.raises(CorruptShardError, match=f"{third}: changed"):
        convert(model, tmp_path / "out", ConvertOptions(outliers="none", workers=2), progress=saboteur)
    assert third not in tree(tmp_path / "out")


@pytest.mark.parametrize("change", CHANGES)
def test_every_reader_of_a_source_file_detects_a_change(change: Callable[[Path], None], model: Path) -> None:
    source = DirectorySource(model)
    with pytest.raises(CorruptShardError, match=f"{SECOND}: changed"), source.fetch(SECOND) as local:
        change(local.path)
    with pytest.raises(CorruptShardError, match=f"{SECOND}: changed"), source.fetch(SECOND):
        pytest.fail("what has changed is given out")


def test_a_reader_detects_whether_its_file_changed(model: Path) -> None:
    reader = FileReader(model / SECOND)
    assert reader.size_bytes == (model / SECOND).stat().st_size
    reader.require_unchanged()
    grow(model / SECOND)
    with pytest.raises(CorruptShardError, match=r"had .* bytes, now"):
        reader.require_unchanged()
    reader.close()


def test_a_file_that_changes_while_it_is_copied_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tmp_path / "words.txt"
    original.write_bytes(b"words" * 1000)
    read_into = FileReader.read_into

    def grown(self: FileReader, offset_bytes: int, buffer: memoryview) -> None:
        read_into(self, offset_bytes, buffer)
        grow(original)

    monkeypatch.setattr(FileReader, "read_into", grown)
    with pytest.raises(CorruptShardError, match="changed while it was read"):
        copy_file(original, tmp_path / "copy.txt")
    assert not (tmp_path / "copy.txt").exists()
    assert tree(tmp_path).keys() == {"words.txt"}


def test_running_a_model_leaves_its_files_as_they_are(tmp_path: Path) -> None:
    """A hard link to one, say, would look like a change of it to the run itself."""
    from support.calibration_models import calibrated, make_model

    model = make_model("llama", tmp_path / "model")
    before = {path.name: path.stat() for path in model.iterdir()}
    calibrated(model)
    after = {path.name: path.stat() for path in model.iterdir()}
    assert {name: state.st_ctime_ns for name, state in before.items()} == {
        name: state.st_ctime_ns for name, state in after.items()
    }
