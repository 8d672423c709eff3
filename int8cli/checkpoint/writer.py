"""Writing output files so that a final name only ever stands for a whole, durable file.

Owns the order of write, fsync and rename.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.reader import FileReader

_COPY_BYTES = 1 << 20
# How much is written before the disk is told to begin. Measured: an fsync then finds next to nothing left to do, and
# pages that are let go and used again cost a virtual machine a fifth to a tenth of what ever new ones do.
_WRITE_BEHIND_BYTES = 1 << 24


class ShardWriter:
    """One safetensors file under construction: every byte's place is known before the first is written.

    Made aside at `partial` with all its room reserved, filled with `write_at` from any thread and in any order, and
    given its final name by `commit`. Until then nothing stands under that name; `abandon` leaves nothing at all.
    """

    def __init__(self, partial: Path, total_bytes: int) -> None:
        self.partial = partial
        with disk_errors(partial, total_bytes):
            partial.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            with disk_errors(partial, total_bytes):
                _reserve(self._descriptor, total_bytes)
            self._written_bytes = 0
        except BaseException:
            self.abandon()
            raise

    def write_at(self, offset_bytes: int, data: memoryview | bytes) -> None:
        view = memoryview(data)
        with disk_errors(self.partial, len(view)):
            while view:
                count = os.pwrite(self._descriptor, view, offset_bytes)
                offset_bytes, view = offset_bytes + count, view[count:]
        self._written_bytes += len(data)  # threads may lose each other's counts: that window is a little longer
        if self._written_bytes >= _WRITE_BEHIND_BYTES:
            self._written_bytes = 0
            _write_out(self._descriptor)

    def commit(self, final: Path) -> None:
        """Make the file durable, then give it its name. Replaces what stands there."""
        with disk_errors(final, 0):
            final.parent.mkdir(parents=True, exist_ok=True)
            os.fsync(self._descriptor)
            _write_out(self._descriptor)
            self._close()
            os.replace(self.partial, final)
            _sync_directory(final.parent)

    def abandon(self) -> None:
        self._close()
        self.partial.unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def write_file(final: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    with _new_file(final, len(data)) as file:
        file.write(data)


def copy_file(source: Path, final: Path) -> str:
    """Copy a file whole or not at all, durably; returns the sha256 of its bytes, in hex."""
    sha256 = hashlib.sha256()
    with closing(FileReader(source)) as original:
        size_bytes = source.stat().st_size
        with _new_file(final, size_bytes) as copy:
            for start in range(0, size_bytes, _COPY_BYTES):
                piece = memoryview(bytearray(min(_COPY_BYTES, size_bytes - start)))
                original.read_into(start, piece)
                sha256.update(piece)
                copy.write(piece)
    return sha256.hexdigest()


@contextmanager
def _new_file(final: Path, size_bytes: int) -> Iterator[BinaryIO]:
    """A file to be written in this context, and given its name after it: aside, fsync, rename, fsync of the directory.

    Left by an error, it leaves nothing. Raises DiskSpaceError, OutputError.
    """
    partial = final.with_name(f".{final.name}.partial")
    with disk_errors(final, size_bytes):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, final)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_directory(final.parent)


def existing_parent(directory: Path) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    while not directory.exists():
        directory = directory.parent
    return directory


def free_bytes(directory: Path) -> int:
    """Room on the disk that holds, or would hold, a directory."""
    return shutil.disk_usage(existing_parent(directory)).free


def _reserve(descriptor: int, total_bytes: int) -> None:
    """Take the room now, so that a full disk shows before the work and writes never wait for allocation."""
    if hasattr(os, "posix_fallocate") and total_bytes:
        try:
            os.posix_fallocate(descriptor, 0, total_bytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, total_bytes)


def _write_out(descriptor: int) -> None:
    """Have the system begin to write what it holds of a file to the disk, and let go of what is there already.

    An output larger than memory would else push everything out of the page cache, the source first.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
