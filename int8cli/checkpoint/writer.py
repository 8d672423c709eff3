"""Writes output files so that a file under its final name is always complete and on disk.

Owns the order of write, fsync and rename.
"""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.own_files import create_file, name_aside, opened_directory
from int8cli.checkpoint.reader import FileReader
from int8cli.errors import OutputError

T = TypeVar("T")

_COPY_BYTES = 1 << 20
_ATTEMPTS = 3
# After this many bytes the system is asked to start writing to disk. Measured: the final fsync then has almost nothing
# left to do, and reusing pages costs a virtual machine a fifth to a tenth of what new pages cost.
_WRITE_BEHIND_BYTES = 1 << 24


class ShardWriter:
    """One safetensors file that is being written. The place of every byte is known in advance.

    The file is created as `partial`, below the directory `below`, with all its space reserved. `write_at` fills it,
    from any thread and in any order. `commit` gives it its final name; `abandon` removes it.
    """

    def __init__(self, partial: Path, total_bytes: int, below: Path) -> None:
        self.partial = partial
        self._below = below
        with disk_errors(partial, total_bytes), opened_directory(partial.parent, below, make=True) as directory:
            self._descriptor = create_file(partial.name, directory)
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
        self._written_bytes += len(data)  # threads may overwrite each other's count, which only delays the next flush
        if self._written_bytes >= _WRITE_BEHIND_BYTES:
            self._written_bytes = 0
            _write_out(self._descriptor)

    def commit(self, final: Path) -> None:
        """Flush the file to disk, then rename it to `final`, below the same directory, replacing any file there."""
        with (
            disk_errors(final),
            opened_directory(self.partial.parent, self._below) as aside,
            opened_directory(final.parent, self._below, make=True) as directory,
        ):
            os.fsync(self._descriptor)
            _write_out(self._descriptor)
            self._close()
            os.replace(self.partial.name, final.name, src_dir_fd=aside, dst_dir_fd=directory)
            os.fsync(directory)

    def abandon(self) -> None:
        """Remove the file. Errors are ignored: another one is being raised."""
        with suppress(OSError, OutputError):
            self._close()
            with opened_directory(self.partial.parent, self._below) as directory:
                os.unlink(self.partial.name, dir_fd=directory)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def write_file(final: Path, data: bytes, *, below: Path | None = None, aside: Path | None = None) -> None:
    """Write a small file completely or not at all. Links are followed only up to `below`, by default its directory.

    Until it is complete it is in `aside`, by default its own directory. Processes that may write one file at the same
    time need an `aside` each; where another process removes it at that moment, it is made again.
    """

    def write() -> None:
        with new_file(final, len(data), below=below, aside=aside) as file:
            file.write(data)

    _with_directories(write)


def copy_file(source: Path, final: Path, *, below: Path | None = None, aside: Path | None = None) -> str:
    """Copy a file completely or not at all. Returns the sha256 of its bytes, in hex. As `write_file` otherwise."""

    def copy() -> str:
        with closing(FileReader(source)) as original:
            sha256, size_bytes = hashlib.sha256(), original.size_bytes
            with new_file(final, size_bytes, below=below, aside=aside) as file:
                for start in range(0, size_bytes, _COPY_BYTES):
                    piece = memoryview(bytearray(min(_COPY_BYTES, size_bytes - start)))
                    original.read_into(start, piece)
                    sha256.update(piece)
                    file.write(piece)
                original.require_unchanged()
        return sha256.hexdigest()

    return _with_directories(copy)


def _with_directories(write: Callable[[], T]) -> T:
    """The result of writing a file. Where somebody removes one of its directories meanwhile, they are made again."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return write()
        except OutputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    return write()


def create_file_once(final: Path, data: bytes, below: Path, aside: Path) -> None:
    """Write a small file completely, unless there is one of that name. Of several processes, one writes it.

    Where the disk has no hard links, the last one does. `below` and `aside` as in `write_file`.
    """
    with (
        disk_errors(final, len(data)),
        opened_directory(final.parent, below, make=True) as directory,
        opened_directory(aside, below, make=True) as beside,
    ):
        with os.fdopen(create_file(final.name, beside), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(final.name, final.name, src_dir_fd=beside, dst_dir_fd=directory)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            os.replace(final.name, final.name, src_dir_fd=beside, dst_dir_fd=directory)
            return
        finally:
            os.fsync(directory)
        os.unlink(final.name, dir_fd=beside)


@contextmanager
def new_file(
    final: Path, size_bytes: int = 0, *, below: Path | None = None, aside: Path | None = None
) -> Iterator[BinaryIO]:
    """A file to write in this context, under a temporary name. At the end: fsync, rename, fsync of the directory.

    If the context ends with an error, the file is removed. `below` and `aside` as in `write_file`. Raises
    DiskSpaceError, OutputError.
    """
    # Two threads may write files of one name into different directories, with one `aside`.
    name = final.name if aside is None else f"{final.parent.name}-{final.name}"
    temporary = name_aside(name, prefix=".", suffix=".partial")
    within = final.parent if below is None else below
    with (
        disk_errors(final, size_bytes),
        opened_directory(final.parent, within, make=True) as directory,
        opened_directory(aside or final.parent, within, make=True) as beside,
    ):
        try:
            with os.fdopen(create_file(temporary, beside), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final.name, src_dir_fd=beside, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=beside)
            raise
        os.fsync(directory)


def existing_parent(directory: Path) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    while not os.path.lexists(directory) and directory != directory.parent:
        directory = directory.parent
    return directory


def free_bytes(directory: Path) -> int:
    """The free space on the disk of a directory, which need not exist yet.

    Some file systems report no size at all. Their free space is unknown, and taken for unlimited.
    """
    with disk_errors(directory):
        usage = shutil.disk_usage(existing_parent(directory))
    return usage.free if usage.total else sys.maxsize


def bytes_on_disk(paths: Iterable[Path], disk: int | None = None) -> int:
    """What files take of a disk, of whichever by default. Those that do not exist take nothing."""
    taken = 0
    for path in paths:
        with suppress(OSError):  # it was removed meanwhile, or was never there
            found = os.lstat(path)
            taken += found.st_blocks * 512 if disk is None or found.st_dev == disk else 0
    return taken


def _reserve(descriptor: int, total_bytes: int) -> None:
    """Reserve the space now, so that a full disk is noticed before the work, and writes never wait for allocation."""
    if hasattr(os, "posix_fallocate") and total_bytes:
        try:
            os.posix_fallocate(descriptor, 0, total_bytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, total_bytes)


def _write_out(descriptor: int) -> None:
    """Ask the system to start writing a file's cached pages to disk, and to drop those that are written.

    Otherwise an output larger than memory would displace everything else from the page cache, first of all the source.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
