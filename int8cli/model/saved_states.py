"""The state between blocks on disk: what a killed run goes on from, and what keeps hidden states out of memory.

Owns the files under one directory. A block counts as finished once the record names it, after its outputs for every
sequence are there. Only the last finished block of each stack is kept: what the ones before it gave is no longer used,
and when a resumed forward passes them again, the last one's output stands in for theirs.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int8cli.checkpoint.lock import hold
from int8cli.checkpoint.writer import write_file
from int8cli.errors import OutputError
from int8cli.model.sites import is_marked, map_tensors, mark, tensors_in

_RECORD = "record.json"


class KeptStates:
    """Outputs of blocks, by stack, block, visit and sequence.

    A `visit` is the count of calls of a block in one forward, 1 but for models that run a block several times.
    `identity` says what run this is; the state of another run in the directory is discarded.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self._directory = directory
        self._identity = json.loads(json.dumps(dict(identity)))
        self._finished: list[str] = []
        self._latest: dict[str, str] = {}
        self._usable = True
        self._lock = _lock(directory)
        record = self._read_record()
        if record is not None and record.get("identity") == self._identity:
            self._finished, self._latest = record["finished"], record["latest"]
        else:
            self.clear()

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def finished(self) -> tuple[str, ...]:
        """The finished blocks, in order."""
        return tuple(self._finished)

    def has(self, block: str, visit: int) -> bool:
        return _key(block, visit) in self._finished

    def put(self, stack: str, block: str, visit: int, sequence: int, output: Any) -> Any:
        """Write a block's output down; returns the same as a mapping of the file, which takes no memory while unused.

        An output that is more than nested tensors cannot be kept, and from there on nothing is.
        """
        if not self._usable or not _is_plain(output):
            self._usable = False
            return output
        path = self._path(_key(block, visit), sequence)
        path.parent.mkdir(parents=True, exist_ok=True)
        marks = [is_marked(tensor) for tensor in tensors_in(output)]
        owned = map_tensors(output, lambda tensor: tensor.detach().cpu().clone())
        torch.save({"output": owned, "marks": marks}, path)
        del owned
        return output if any(tensor.device.type != "cpu" for tensor in tensors_in(output)) else self._load(path)

    def get(self, stack: str, sequence: int) -> Any:
        """The output of the last finished block of a stack."""
        return self._load(self._path(self._latest[stack], sequence))

    def finish(self, stack: str, block: str, visit: int) -> None:
        """All outputs of the block are there: put it on record, and drop those of the one before it."""
        if not self._usable:
            return
        before = self._latest.get(stack)
        self._finished.append(_key(block, visit))
        self._latest[stack] = _key(block, visit)
        record = {"identity": self._identity, "finished": self._finished, "latest": self._latest}
        write_file(self._directory / _RECORD, json.dumps(record).encode())
        if before is not None:
            shutil.rmtree(self._directory / before, ignore_errors=True)

    def abandon(self) -> None:
        """Keep nothing, now and from here on."""
        self._usable = False
        self.clear()

    def close(self) -> None:
        """Let others use the directory; what was kept stays."""
        if self._lock < 0:
            return
        if not self._directory.exists():
            _lock_file(self._directory).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there is something else in it
                self._directory.parent.rmdir()
        os.close(self._lock)
        self._lock = -1

    def clear(self) -> None:
        """Remove everything."""
        self._finished, self._latest = [], {}
        shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, key: str, sequence: int) -> Path:
        return self._directory / key / f"{sequence}.pt"

    def _load(self, path: Path) -> Any:
        saved = torch.load(path, mmap=True, weights_only=True)
        marks = iter(saved["marks"])
        return map_tensors(saved["output"], lambda tensor: mark(tensor) if next(marks) else tensor)

    def _read_record(self) -> Any:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self._directory / _RECORD).read_bytes())
        return None


def _lock(directory: Path) -> int:
    """Hold the directory for this process. Raises OutputInUseError where another holds it."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(_lock_file(directory), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(
            f"{directory} cannot be written ({error.strerror})", hint="Choose a directory you may write to."
        ) from error
    hold(
        descriptor,
        f"another int8cli is running this model, and keeps its state in {directory}",
        "Wait for it to end, or choose another directory.",
    )
    return descriptor


def _lock_file(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")


def _key(block: str, visit: int) -> str:
    return f"{block}@{visit}".replace(os.sep, "_")


def _is_plain(output: Any) -> bool:
    if isinstance(output, (tuple, list)):
        return type(output) in (tuple, list) and all(map(_is_plain, output))
    if isinstance(output, dict):
        return type(output) is dict and all(isinstance(key, str) and _is_plain(value) for key, value in output.items())
    return output is None or isinstance(output, (Tensor, bool, int, float, str))
