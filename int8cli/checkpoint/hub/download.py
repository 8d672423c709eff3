"""Downloads that are retried and go on where they stopped.

Owns the loop around a body. huggingface_hub's own download starts from zero after each failure (a temporary name per
attempt since 2.x), which is why that loop is here.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.hub.failures import ShortBodyError
from int8cli.checkpoint.hub.requests import RemoteFile, answers_range, get
from int8cli.checkpoint.hub.retries import Retries


def download(
    remote: RemoteFile, part: Path, size_bytes: int, retries: Retries, on_bytes: Callable[[int], None] | None = None
) -> None:
    """Bring `part` to the file's `size_bytes`, going on from the bytes it already holds.

    `on_bytes` hears of each piece as it arrives. Raises TransferError after too many failures in a row without
    progress, and then leaves the part for the next run; DiskSpaceError or OutputError if it cannot be written.
    """
    with disk_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        if part.stat().st_size > size_bytes:
            os.truncate(part, 0)
    furthest = part.stat().st_size
    while part.stat().st_size < size_bytes:
        failure: Exception = ShortBodyError("the body ended early")
        try:
            _append(remote, part, size_bytes, retries, on_bytes)
        except Exception as error:  # `failed` raises whatever is not transient
            failure = error
        held = part.stat().st_size
        # A server without ranges starts from zero each time: only new ground counts as progress.
        if held > furthest:
            furthest = held
            retries.progressed()
        if held < size_bytes:
            retries.failed(failure)


def _append(
    remote: RemoteFile, part: Path, size_bytes: int, retries: Retries, on_bytes: Callable[[int], None] | None
) -> None:
    held = part.stat().st_size
    with get(remote, f"bytes={held}-" if held else None) as response, _appending(part) as out:
        if held and not answers_range(response, held):
            with disk_errors(part):
                out.truncate(0)
            held = 0
        # Pieces as they come from the socket: what has arrived before a failure is then in the file.
        for piece in response.iter_bytes():
            retries.check_stopped()
            held += len(piece)
            if held > size_bytes:
                with disk_errors(part):
                    out.truncate(0)
                raise ShortBodyError(f"the body is longer than the {size_bytes:,} bytes announced")
            _write_all(out, piece, part)
            if on_bytes is not None:
                on_bytes(len(piece))


@contextmanager
def _appending(part: Path) -> Iterator[io.FileIO]:
    with disk_errors(part):
        out = io.FileIO(part, "a")
    with out:
        yield out


def _write_all(out: io.FileIO, piece: bytes, part: Path) -> None:
    view = memoryview(piece)
    with disk_errors(part):
        while view:
            view = view[out.write(view) :]
