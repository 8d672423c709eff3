"""Downloads that are retried and resume where they stopped.

Owns the loop of attempts. huggingface_hub's own download starts from zero after each failure (since 2.x, every attempt
has its own temporary file).
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
    """Download a file of `size_bytes` bytes to `part`, resuming after the bytes that `part` already has.

    `on_bytes` is called with the size of each piece that arrives. Links are not followed after the directory `below`.
    Raises TransferError after too many failures in a row without progress, and leaves the part for the next run;
    DiskSpaceError or OutputError if the part cannot be written.
    """
    with GrowingFile.opened(part, below) as out:
        if out.size_bytes > size_bytes:
            out.empty()
        furthest = out.size_bytes
        while out.size_bytes < size_bytes:
            failure: Exception = ShortBodyError("the body ended early")
            try:
                _append(remote, out, size_bytes, retries, on_bytes)
            except Exception as error:  # `failed` raises every error that is not transient
                failure = error
            received = out.size_bytes
            # A server without ranges starts from zero each time: only bytes beyond the furthest count as progress.
            if received > furthest:
                furthest = received
                retries.progressed()
            if received < size_bytes:
                retries.failed(failure)


def _append(
    remote: RemoteFile, out: "GrowingFile", size_bytes: int, retries: Retries, on_bytes: Callable[[int], None] | None
) -> None:
    received = out.size_bytes
    with get(remote, f"bytes={received}-" if received else None) as response:
        if received and not answers_range(response, received):
            out.empty()
            received = 0
        # Each piece is written as it arrives, so that after a failure the file has everything that was received.
        for piece in response.iter_bytes():
            retries.check_stopped()
            received += len(piece)
            if received > size_bytes:
                out.empty()
                raise ShortBodyError(f"the body is longer than the {size_bytes:,} bytes announced")
            out.append(piece)
            if on_bytes is not None:
                on_bytes(len(piece))


class GrowingFile:
    """A file of ours that grows until it is complete. Every method may raise DiskSpaceError or OutputError."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    @classmethod
    @contextmanager
    def opened(cls, path: Path, below: Path) -> Iterator["GrowingFile"]:
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
        self.shorten(self.size_bytes)

    def shorten(self, nbytes: int) -> None:
        """Remove so many of the last bytes, or all."""
        with disk_errors(self._path):
            os.ftruncate(self._descriptor, max(self.size_bytes - nbytes, 0))

    def sync(self) -> None:
        """Write to the disk what was appended before."""
        with disk_errors(self._path):
            os.fsync(self._descriptor)

    def append(self, piece: bytes) -> None:
        view = memoryview(piece)
        with disk_errors(self._path):
            while view:
                view = view[os.write(self._descriptor, view) :]
