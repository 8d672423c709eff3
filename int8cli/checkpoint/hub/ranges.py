"""Ranges of a file on the Hub, and a file object that reads them.

Owns the promise that no more bytes are transferred than were requested.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from int8cli.checkpoint.hub.failures import ShortBodyError
from int8cli.checkpoint.hub.requests import RemoteFile, answers_range, get, total_bytes
from int8cli.checkpoint.hub.retries import Retries
from int8cli.checkpoint.range_stream import RangeStream
from int8cli.errors import SourceError

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


class RangeReader(RangeStream):
    """A file on the Hub as a stream. `size_bytes` is called if the server has not sent the size when it is needed."""

    def __init__(self, remote: RemoteFile, retries: Retries, size_bytes: Callable[[], int]) -> None:
        super().__init__()
        self._remote = remote
        self._retries = retries
        self._ask = size_bytes

    def _read_range(self, start: int, length: int) -> bytearray:
        received = read_range(self._remote, start, length, self._retries)
        if received.total_bytes is not None:
            self._size_bytes = received.total_bytes
        return received.data

    def _ask_size(self) -> int:
        return self._ask()
