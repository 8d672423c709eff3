"""Downloads that are retried and go on where they stopped.

Owns the loop around a body. huggingface_hub's own download starts from zero after each failure (a temporary name per
attempt since 2.x), which is why that loop is here.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.hub.failures import ShortBodyError
from int8cli.checkpoint.hub.requests import RemoteFile, answers_range, get
from int8cli.checkpoint.hub.retries import Retries
from int8cli.checkpoint.own_files import open_or_create, opened_directory


def download(
    remote: RemoteFile,
    part: Path,
    size_bytes: int,
    retries: Retries,
    on_bytes: Callable[[int], None] | None = None,
    *,
    below: Path,
) -> None:
    """Bring `part` to the file's `size_bytes`, going on from the bytes it already holds.

    `on_bytes` hears of each piece as it arrives. No link is followed after the directory `below`. Raises TransferError
    after too many failures in a row without progress, and then leaves the part for the next run; DiskSpaceError or
    OutputError if it cannot be written.
    """
    with _Part.opened(part, below) as out:
        if out.size_bytes > size_bytes:
            out.empty()
        furthest = out.size_bytes
        while out.size_bytes < size_bytes:
            failure: Exception = ShortBodyError("the body ended early")
            try:
                _append(remote, out, size_bytes, retries, on_bytes)
            except Exception as error:  # `failed` raises whatever is not transient
                failure = error
            held = out.size_bytes
            # A server without ranges starts from zero each time: only new ground counts as progress.
            if held > furthest:
                furthest = held
                retries.progressed()
            if held < size_bytes:
                retries.failed(failure)


def _append(
    remote: RemoteFile, out: "_Part", size_bytes: int, retries: Retries, on_bytes: Callable[[int], None] | None
) -> None:
    held = out.size_bytes
    with get(remote, f"bytes={held}-" if held else None) as response:
        if held and not answers_range(response, held):
            out.empty()
            held = 0
        # Pieces as they come from the socket: what has arrived before a failure is then in the file.
        for piece in response.iter_bytes():
            retries.check_stopped()
            held += len(piece)
            if held > size_bytes:
                out.empty()
                raise ShortBodyError(f"the body is longer than the {size_bytes:,} bytes announced")
            out.append(piece)
            if on_bytes is not None:
                on_bytes(len(piece))


class _Part:
    """A file that grows until it is whole. Every method raises DiskSpaceError or OutputError."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    @classmethod
    @contextmanager
    def opened(cls, path: Path, below: Path) -> Iterator["_Part"]:
        with disk_errors(path), opened_directory(path.parent, below, make=True) as directory:
            descriptor = open_or_create(path.name, directory)
        try:
            yield cls(path, descriptor)
        finally:
            os.close(descriptor)

    @property
    def size_bytes(self) -> int:
        with disk_errors(self._path):
            return os.fstat(self._descriptor).st_size

    def empty(self) -> None:
        with disk_errors(self._path):
            os.ftruncate(self._descriptor, 0)

    def append(self, piece: bytes) -> None:
        view = memoryview(piece)
        with disk_errors(self._path):
            while view:
                view = view[os.write(self._descriptor, view) :]
