"""Ranges of a file on the Hub, and a file object that reads them.

Owns the promise that no more bytes are transferred than were requested.
"""

import errno
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from int8cli.checkpoint.hub.failures import ShortBodyError
from int8cli.checkpoint.hub.requests import RemoteFile, answers_range, get, total_bytes
from int8cli.checkpoint.hub.retries import Retries
from int8cli.errors import SourceError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# If a server ignores Range, a header near the start of the file can still be read by skipping what is before it.
_MAX_SKIPPED_BYTES = 16 << 20


@dataclass(slots=True)
class ByteRange:
    """Bytes of a file from `start` on. `total_bytes` is the file's size, once the server has sent it."""

    start: int
    data: bytearray = field(default_factory=bytearray)
    total_bytes: int | None = None


def read_range(remote: RemoteFile, start: int, length: int, retries: Retries) -> ByteRange:
    """Read `length` bytes from `start` on, or fewer at the file's end. Nothing beyond them is transferred."""
    received = ByteRange(start)
    while len(received.data) < length:
        before = len(received.data)
        try:
            _receive(remote, received, length)
        except Exception as error:  # `failed` raises every error that is not transient
            if len(received.data) > before:
                retries.progressed()
            retries.failed(error)
        else:
            if len(received.data) == length or _is_complete(received):
                break
            if len(received.data) > before:
                retries.progressed()
            retries.failed(ShortBodyError("the body ended early"))
    return received


def _is_complete(received: ByteRange) -> bool:
    """Whether the server has no more of the requested bytes. Unknown sizes count as complete."""
    return received.total_bytes is None or received.start + len(received.data) >= received.total_bytes


def _receive(remote: RemoteFile, received: ByteRange, length: int) -> None:
    first = received.start + len(received.data)
    with get(remote, f"bytes={first}-{received.start + length - 1}") as response:
        if response.status_code == 416:
            received.total_bytes = total_bytes(response)
            return
        whole_file = not answers_range(response, first)
        received.total_bytes = total_bytes(response)
        skip = first if whole_file else 0
        if skip > _MAX_SKIPPED_BYTES:
            raise SourceError("The server sends only whole files (it ignores Range); this read starts far inside one")
        for piece in response.iter_bytes():
            requested = piece[skip:]
            skip -= len(piece) - len(requested)
            received.data += requested
            # An exact answer is read to its end, so that the connection can be reused; a longer one is cut off.
            if len(received.data) > length or (whole_file and len(received.data) == length):
                break
    del received.data[length:]


class RangeReader(io.RawIOBase):
    """A file on the Hub as a seekable stream. Each read is one request for exactly that range.

    For read-ahead, wrap it in a BufferedReader. `size_bytes` is called if a read or a seek needs the file's end before
    the server has sent the size.
    """

    def __init__(self, remote: RemoteFile, retries: Retries, size_bytes: Callable[[], int]) -> None:
        self._remote = remote
        self._retries = retries
        self._size_bytes = size_bytes
        self._total_bytes: int | None = None
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            offset += self._end()
        if offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = offset
        return offset

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        length = len(view)
        if self._position and length:  # a first read from the start gets the size with its own answer
            length = max(0, min(length, self._end() - self._position))
        if not length:
            return 0
        received = read_range(self._remote, self._position, length, self._retries)
        if received.total_bytes is not None:
            self._total_bytes = received.total_bytes
        view[: len(received.data)] = received.data
        self._position += len(received.data)
        return len(received.data)

    def readall(self) -> bytes:
        return self.read(max(0, self._end() - self._position)) or b""  # one request; the default reads in 8 KiB

    def _end(self) -> int:
        if self._total_bytes is None:
            self._total_bytes = self._size_bytes()
        return self._total_bytes
