"""The outputs of blocks, saved on disk: a killed run resumes from them, and hidden states need no memory.

Owns the files under one directory. A block is finished once the record names it, which happens after its outputs for
every sequence are saved. Only the last finished block of each stack stays on disk. A resumed forward passes the earlier
blocks again, and uses the last one's output in place of theirs.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.lock import lock_by_name
from int8cli.checkpoint.own_files import (
    create_file,
    open_or_create,
    opened_directory,
    remove_file,
    remove_tree,
    sync_files,
)
from int8cli.checkpoint.reader import open_regular, read_small
from int8cli.checkpoint.writer import write_file
from int8cli.errors import CheckpointError, OutputError, SavedStateError, UnsupportedModelError
from int8cli.model.sites import is_marked, map_tensors, mark, tensors_in
from int8cli.progress import Progress
from int8cli.typed_json import parse_json, read_as

_RECORD = "record.json"
# What torch.load, safetensors and json raise for a file that is damaged, truncated or unreadable.
_UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError),
    *(UnpicklingError, SafetensorError, CheckpointError),
)

Step = TypeVar("Step")


@dataclass(frozen=True, slots=True)
class _Record:
    """The record: which run it belongs to, the finished blocks in order, and the last of them in each stack."""

    identity: Any
    finished: tuple[str, ...]
    latest: dict[str, str]


class SavedStates:
    """Outputs of blocks, by stack, block, visit and sequence.

    `visit` counts the calls of a block in one forward; it is 1 unless a model calls a block several times. `identity`
    identifies the run: if the directory has the state of another run, that is deleted.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], below: Path | None = None) -> None:
        """Links are followed up to `below`, the directory above this one unless given, and none after it."""
        self._directory = directory
        self.below = below or directory.parent
        self._identity = json.loads(json.dumps(dict(identity)))
        self._finished: list[str] = []
        self._latest: dict[str, str] = {}
        self._usable = True
        self._lock = _lock(directory, self.below)
        self._read_record()
        self.resumed = bool(self._finished)
        if not self.resumed:
            self.clear()

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def finished(self) -> tuple[str, ...]:
        """The names of the finished blocks, in order."""
        return tuple(key.rpartition("@")[0] for key in self._finished)

    def has(self, block: str, visit: int) -> bool:
        return _key(block, visit) in self._finished

    def put(self, stack: str, block: str, visit: int, sequence: int, output: Any) -> Any:
        """Save a block's output. Returns it as a mapping of the file, which needs no memory while it is not used.

        Only nested tensors and plain values can be saved. After any other output, nothing more is saved.
        """
        if not self._usable or not _is_plain(output):
            self._usable = False
            return output
        path = self._path(_key(block, visit), sequence)
        marks = [is_marked(tensor) for tensor in tensors_in(output)]
        owned = map_tensors(output, lambda tensor: tensor.detach().cpu().clone())
        _save({"output": owned, "marks": marks}, path, self.below)
        del owned
        return output if any(tensor.device.type != "cpu" for tensor in tensors_in(output)) else self._load(path)

    def get(self, stack: str, sequence: int) -> Any:
        """The output of the last finished block of a stack. Raises SavedStateError."""
        return self._load(self._path(self._latest[stack], sequence))

    def finish(self, stack: str, block: str, visit: int) -> None:
        """Record the block as finished, and delete the outputs of the block before it."""
        if not self._usable:
            return
        written = self._directory / _key(block, visit)
        with disk_errors(written):
            sync_files(written, self.below)  # after a power failure, the record must not name what is lost
        before = self._latest.get(stack)
        self._finished.append(_key(block, visit))
        self._latest[stack] = _key(block, visit)
        record = {"identity": self._identity, "finished": self._finished, "latest": self._latest}
        write_file(self._directory / _RECORD, json.dumps(record).encode(), below=self.below)
        if before is not None:
            remove_tree(self._directory / before, self.below)

    def abandon(self) -> None:
        """Delete everything and stop saving."""
        self._usable = False
        self.clear()

    def close(self) -> None:
        """Release the directory for other processes; the saved state stays."""
        if self._lock < 0:
            return
        if not self._directory.exists():
            with contextlib.suppress(OSError, OutputError):
                remove_file(_lock_file(self._directory), self.below)
                self._directory.parent.rmdir()  # unless it holds other files
        os.close(self._lock)
        self._lock = -1

    def clear(self) -> None:
        """Delete everything that is saved."""
        self._finished, self._latest = [], {}
        remove_tree(self._directory, self.below)

    def _path(self, key: str, sequence: int) -> Path:
        return self._directory / key / f"{sequence}.pt"

    def _load(self, path: Path) -> Any:
        with read_back(path):
            saved = _mapped(path)
            marks = iter(saved["marks"])
            return map_tensors(saved["output"], lambda tensor: mark(tensor) if next(marks) else tensor)

    def _read_record(self) -> None:
        """Read the record. One of another run, or one that cannot be read, is ignored: every block then runs again."""
        with contextlib.suppress(SavedStateError), read_back(self._directory / _RECORD) as path:
            record = read_as(_Record, parse_json(read_small(path)))
            if record.identity == self._identity and all(map(_is_key, (*record.finished, *record.latest.values()))):
                self._finished, self._latest = list(record.finished), dict(record.latest)


def resumed_or_started_over(
    run: Callable[[], Iterator[Step]], saved: SavedStates | None, progress: Progress
) -> Iterator[Step]:
    """Yield from `run()`. If it cannot resume from the saved state, delete the state and yield from `run()` again."""
    try:
        yield from run()
        return
    except (UnsupportedModelError, SavedStateError) as error:
        if saved is None or not saved.resumed:
            raise
        # A model whose blocks share more than their outputs cannot be resumed in the middle.
        why = str(error) if isinstance(error, SavedStateError) else "this model cannot be resumed in the middle"
    progress.note(f"{why}: starting over")
    saved.clear()
    yield from run()


@contextmanager
def read_back(path: Path) -> Iterator[Path]:
    """A context for reading a file that int8cli saved to resume from. Raises SavedStateError if reading fails."""
    try:
        yield path
    except _UNREADABLE as error:
        raise SavedStateError(
            f"{path} cannot be read back ({type(error).__name__}: {error!s:.200})",
            hint="Check the disk, and run the same command again.",
        ) from error


def _mapped(path: Path) -> Any:
    """What `_save` wrote, as a mapping of the file; in memory where torch cannot map a file whose name is not UTF-8."""
    os.close(open_regular(path))  # a pipe would block for ever
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            return torch.load(file, weights_only=True)
    return torch.load(path, mmap=True, weights_only=True)


def _save(value: Any, path: Path, below: Path) -> None:
    """torch.save to a file, without following links after `below`. Raises DiskSpaceError, OutputError."""
    with (
        disk_errors(path),
        opened_directory(path.parent, below, make=True) as directory,
        os.fdopen(create_file(path.name, directory), "wb") as file,
    ):
        watched = _WatchedFile(file)
        torch.save(value, watched)  # type: ignore[arg-type]  # it takes whatever has `write`
        watched.raise_error()


class _WatchedFile:
    """A file for torch.save that remembers its first error. torch.save itself would raise a RuntimeError or crash.

    After an error nothing more is written; `raise_error` raises it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def flush(self) -> None:
        """Nothing to do: closing the file flushes it."""

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def _lock(directory: Path, below: Path) -> int:
    """Lock the directory for this process. Raises OutputInUseError if another process has it."""
    file = _lock_file(directory)

    def open_file() -> int:
        with disk_errors(directory), opened_directory(file.parent, below, make=True) as parent:
            return open_or_create(file.name, parent)

    in_use = f"another int8cli process is running this model and uses {directory}"
    return lock_by_name(file, open_file, in_use, "Wait for it to end, or choose another directory.")


def _lock_file(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")


def _key(block: str, visit: int) -> str:
    return f"{block}@{visit}".replace(os.sep, "_")


def _is_key(name: str) -> bool:
    """Whether `_key` could have made this name. Such a name cannot lead out of the directory."""
    return "@" in name and os.sep not in name and "\0" not in name


def _is_plain(output: Any) -> bool:
    if isinstance(output, (tuple, list)):
        return type(output) in (tuple, list) and all(map(_is_plain, output))
    if isinstance(output, dict):
        return type(output) is dict and all(isinstance(key, str) and _is_plain(value) for key, value in output.items())
    return output is None or isinstance(output, (Tensor, bool, int, float, str))
