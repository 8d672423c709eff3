"""Reads a shard's bytes at an offset into the caller's buffer.

Owns how bytes are read from disk. Knows only the offsets of tensors.
"""

import errno
import io
import os
import stat
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from int8cli.checkpoint.disk import reading_error, reading_errors
from int8cli.checkpoint.file_state import FileState
from int8cli.errors import CorruptShardError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from torch import Tensor


def open_regular(path: Path | str) -> int:
    """A descriptor to read a regular file. Raises OSError, also for anything else: a pipe could block for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_small(path: Path, limit_bytes: int | None = None) -> bytes:
    """All bytes of a regular file. Raises OSError, also if it has more than `limit_bytes`."""
    with open(open_regular(path), "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if limit_bytes is not None and size_bytes > limit_bytes:
            raise OSError(errno.EINVAL, f"{size_bytes:,} bytes are more than int8cli writes", str(path))
        return file.read(size_bytes + 1)


class ShardReader(Protocol):
    """Random access to a shard's bytes. Thread-safe."""

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset_bytes` on. Raises CorruptShardError if the shard ends early."""

    def close(self) -> None: ...


class FileReader:
    """A shard on disk, read with preadv. Unlike a mapping, it uses no memory besides the caller's buffer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = open_regular(path)
        except OSError as error:
            raise reading_error(path, error) from error
        try:
            with reading_errors(path):
                self._state = FileState.of(os.fstat(self._descriptor))
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def state(self) -> FileState:
        """The file's state when it was opened."""
        return self._state

    @property
    def size_bytes(self) -> int:
        """The file's size when it was opened."""
        return self._state.size_bytes

    def require_unchanged(self) -> None:
        """Raise CorruptShardError if the file was written to since it was opened."""
        with reading_errors(self._path):
            status = os.fstat(self._descriptor)
        self._state.require_same(status, self._path.name)

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], offset_bytes + done)
            except OSError as error:
                raise reading_error(self._path, error) from error
            if count == 0:
                raise CorruptShardError(
                    f"{self._path.name}: ends at byte {offset_bytes + done:,}, before the data that its header names",
                    hint="The file is truncated, or it changed while it was read: download it again, then run again.",
                )
            done += count

    def read_ahead(self, offset_bytes: int, size_bytes: int) -> None:
        """Have the system start to read these bytes, where it takes advice."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset_bytes, size_bytes, os.POSIX_FADV_WILLNEED)

    def forget(self, offset_bytes: int, size_bytes: int) -> None:
        """Have the system drop these bytes from the page cache, where it takes advice."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset_bytes, size_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._descriptor)


class _CheckedFile(io.FileIO):
    """A file whose reads raise SourceError instead of OSError."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._display_name = path, name
        super().__init__(path, "rb", opener=lambda name, _: open_regular(name))

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        with reading_errors(self._path, self._display_name):
            return super().readinto(buffer)

    def read(self, size: int | None = -1, /) -> bytes:
        with reading_errors(self._path, self._display_name):
            return super().read(-1 if size is None else size)

    def readall(self) -> bytes:
        with reading_errors(self._path, self._display_name):
            return super().readall()


def open_to_read(path: Path, name: str | None = None) -> BinaryIO:
    """Open a file, called `name` in messages. Opening and reading it raise SourceError instead of OSError.

    A seek to a negative position still raises OSError.
    """
    display_name = name or path.name
    with reading_errors(path, display_name):
        return io.BufferedReader(_CheckedFile(path, display_name))


def size_of(path: Path) -> int:
    """A file's size. Raises SourceError."""
    with reading_errors(path):
        return path.stat().st_size


class TensorsReader:
    """A shard in memory, read as the concatenation of its tensors' bytes.

    Used for legacy `.bin` files, which cannot be read at an offset. `tensors` are in the order of the shard's contents.
    """

    def __init__(self, tensors: "Sequence[Tensor]") -> None:
        import torch

        self._runs = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
        self._ends = list(accumulate(len(run) for run in self._runs))

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        import torch

        done = 0
        index = bisect_right(self._ends, offset_bytes)
        while done < len(buffer):
            run = self._runs[index]
            start = offset_bytes + done - (self._ends[index] - len(run))
            count = min(len(run) - start, len(buffer) - done)
            if count:
                torch.frombuffer(buffer[done : done + count], dtype=torch.uint8).copy_(run[start : start + count])
            done += count
            index += 1

    def close(self) -> None:
        self._runs = []
