"""File systems in memory, of a given size, seen by this process and its children only.

Owns mount(2), through ctypes, for Linux. Needs the right to mount, as root of a container often has.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNS = 0x20000
_MS_REMOUNT, _MS_REC, _MS_PRIVATE = 0x20, 0x4000, 0x40000
_MNT_DETACH = 2
_BLOCK_BYTES = 4096
# Linux limits the files of a mounted file system only if they were limited from the start.
_AMPLE_FILES = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryDisk:
    """A mounted file system. Sizes are bytes, rounded down to blocks; 0 files stands for a million."""

    path: Path

    def used(self) -> tuple[int, int]:
        """Bytes and files."""
        found = os.statvfs(self.path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree

    def resize(self, size_bytes: int, files: int) -> None:
        _mount("tmpfs", self.path, _MS_REMOUNT, _options(size_bytes, files))


def make_private() -> None:
    """From now on what this process mounts, and what is mounted elsewhere, stays apart. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        raise _last_error()
    _mount("", Path("/"), _MS_REC | _MS_PRIVATE, "")


def unable(scratch: Path) -> str:
    """Why nothing can be mounted here, in a line; empty where it can."""
    try:
        scratch.mkdir(exist_ok=True)
        with memory_disk(scratch, _BLOCK_BYTES):
            return ""
    except OSError as error:
        return f"mounting a file system is not allowed here ({error.strerror})"


@contextmanager
def memory_disk(path: Path, size_bytes: int) -> Iterator[MemoryDisk]:
    """An empty file system at a directory. Raises OSError."""
    _mount("tmpfs", path, 0, _options(size_bytes, 0))
    try:
        yield MemoryDisk(path)
    finally:
        if ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(path), _MNT_DETACH):
            raise _last_error()


def _options(size_bytes: int, files: int) -> str:
    return f"size={max(1, size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES},nr_inodes={files or _AMPLE_FILES}"


def _mount(kind: str, path: Path, flags: int, options: str) -> None:
    kind_bytes = kind.encode() or None
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(kind_bytes, os.fsencode(path), kind_bytes, ctypes.c_ulong(flags), options.encode() or None):
        raise _last_error()


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
