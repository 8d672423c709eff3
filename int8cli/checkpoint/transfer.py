"""Bytes from the Hub over HTTP: ranges, and downloads that are retried and go on where they stopped.

Owns the loop around a request that may fail. Knows URLs and files, nothing of repositories.
huggingface_hub brings session, headers and error classes; its own download starts from zero after each failure
(a temporary name per attempt since 2.x), which is why the loop over a body is here.
"""

import errno
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from int8cli.checkpoint.failures import (
    TRY_AGAIN,
    ShortBodyError,
    WrongRangeError,
    asked_pause_s,
    described,
    disk_error,
    is_foreign,
    is_transient,
    next_step,
    translated,
)
from int8cli.errors import Int8cliError, SourceError, TransferError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")

# Where a server ignores Range, a header near the start of the file can still be had by reading up to it.
_MAX_SKIPPED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often to fail in a row without a byte of progress before giving up, and how long to pause in between.

    The pause doubles from `first_pause_s` up to `max_pause_s`; a server's own word (Retry-After) goes before it.
    """

    attempts: int = 8
    first_pause_s: float = 1.0
    max_pause_s: float = 60.0

    def pause_s(self, failures: int) -> float:
        """The pause after so many failures in a row."""
        return min(self.max_pause_s, self.first_pause_s * 2.0 ** (failures - 1))


class TransferStoppedError(TransferError):
    """The source was closed while a transfer ran."""


class Retries:
    """The failures of one transfer so far. `what` names it in messages; `on_wait(what, why, pause_s)` hears of each."""

    def __init__(
        self, policy: RetryPolicy, what: str, stop: Event, on_wait: Callable[[str, str, float], None] | None = None
    ) -> None:
        self.what = what
        self._policy = policy
        self._stop = stop
        self._on_wait = on_wait
        self._failures = 0

    def check_stopped(self) -> None:
        """Raises TransferStoppedError once the source is closed."""
        if self._stop.is_set():
            raise TransferStoppedError(f"{self.what}: the transfer was stopped", hint=TRY_AGAIN)

    def progressed(self) -> None:
        """Bytes have come: what failed before them no longer counts."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Pause before the next attempt; or raise, if another one would not help or there have been enough."""
        if isinstance(error, Int8cliError) or not is_foreign(error):
            raise error
        if not is_transient(error):
            raise translated(error, self.what) from error
        self._failures += 1
        if self._failures >= self._policy.attempts:
            times = f"{self._failures} times in a row" if self._failures > 1 else "once"
            raise TransferError(f"{self.what}: failed {times}: {described(error)}", hint=next_step(error)) from error
        pause_s = asked_pause_s(error)
        if pause_s is None:
            pause_s = self._policy.pause_s(self._failures)
        if self._on_wait is not None:
            self._on_wait(self.what, described(error), pause_s)
        self._stop.wait(pause_s)
        self.check_stopped()

    def call(self, request: Callable[[], T]) -> T:
        """What `request` returns, once it does."""
        while True:
            self.check_stopped()
            try:
                return request()
            except Exception as error:  # `failed` raises whatever is not transient
                self.failed(error)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at a URL, and how to ask for it. `headers` carry the token; redirects to another host drop it."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    timeout_s: float


def download(
    remote: RemoteFile, part: Path, size_bytes: int, retries: Retries, on_bytes: Callable[[int], None] | None = None
) -> None:
    """Bring `part` to the file's `size_bytes`, going on from the bytes it already holds.

    `on_bytes` hears of each piece as it arrives. Raises TransferError after too many failures in a row without
    progress, and then leaves the part for the next run; DiskSpaceError or OutputError if it cannot be written.
    """
    with _local_errors(part):
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
    with _get(remote, f"bytes={held}-" if held else None) as response, _appending(part) as out:
        if held and not _answers_range(response, held):
            with _local_errors(part):
                out.truncate(0)
            held = 0
        # Pieces as they come from the socket: what has arrived before a failure is then in the file.
        for piece in response.iter_bytes():
            retries.check_stopped()
            held += len(piece)
            if held > size_bytes:
                with _local_errors(part):
                    out.truncate(0)
                raise ShortBodyError(f"the body is longer than the {size_bytes:,} bytes announced")
            _write_all(out, piece, part)
            if on_bytes is not None:
                on_bytes(len(piece))


@dataclass(slots=True)
class ByteRange:
    """Bytes of a file from `start` on. `total_bytes` is the file's size, once the server has said it."""

    start: int
    data: bytearray = field(default_factory=bytearray)
    total_bytes: int | None = None


def read_range(remote: RemoteFile, start: int, length: int, retries: Retries) -> ByteRange:
    """At most `length` bytes from `start` on, fewer only at the file's end; nothing beyond them is transferred."""
    received = ByteRange(start)
    while len(received.data) < length:
        before = len(received.data)
        try:
            _receive(remote, received, length)
        except Exception as error:  # `failed` raises whatever is not transient
            if len(received.data) > before:
                retries.progressed()
            retries.failed(error)
        else:
            break
    return received


def _receive(remote: RemoteFile, received: ByteRange, length: int) -> None:
    first = received.start + len(received.data)
    with _get(remote, f"bytes={first}-{received.start + length - 1}") as response:
        if response.status_code == 416:
            received.total_bytes = _total_bytes(response)
            return
        whole_file = not _answers_range(response, first)
        received.total_bytes = _total_bytes(response)
        skip = first if whole_file else 0
        if skip > _MAX_SKIPPED_BYTES:
            raise SourceError("The server gives whole files only (it ignores Range), and this read is far inside one")
        for piece in response.iter_bytes():
            kept = piece[skip:]
            skip -= len(piece) - len(kept)
            received.data += kept
            # An exact answer is read to its end, which keeps the connection; a longer one is cut off.
            if len(received.data) > length or (whole_file and len(received.data) == length):
                break
    del received.data[length:]


class RangeReader(io.RawIOBase):
    """A file on the Hub as a seekable stream: each read is one ranged request for what was asked, no more.

    Wrap it in a BufferedReader, whose buffer is then the read-ahead. `size_bytes` is asked for where a read or a seek
    needs the end before the server has mentioned it.
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
        if self._position and length:  # a first read at the start learns the size from its own answer
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


@contextmanager
def _get(remote: RemoteFile, byte_range: str | None) -> Iterator[Any]:
    """The streamed answer (an httpx Response) to a GET. Raises huggingface_hub's errors, but lets 416 through."""
    from huggingface_hub import get_session, hf_raise_for_status

    # Compressed bytes would have other offsets than the file's.
    headers = {**remote.headers, "Accept-Encoding": "identity"}
    if byte_range is not None:
        headers["Range"] = byte_range
    # The URL is asked anew each time, not the place it redirects to: signed addresses run out within the hour. The
    # session follows redirects and leaves the token behind when the host changes.
    with get_session().stream(
        "GET", remote.url, headers=headers, timeout=remote.timeout_s, follow_redirects=True
    ) as response:
        if response.status_code != 416 or byte_range is None:
            hf_raise_for_status(response)
        yield response


def _answers_range(response: Any, first: int) -> bool:
    """Whether the answer starts at byte `first` (206) or is the whole file (200)."""
    if response.status_code == 200:
        return False
    stated = response.headers.get("Content-Range", f"bytes {first}-")
    match = re.match(r"bytes (\d+)-", stated)
    if response.status_code != 206 or match is None or int(match[1]) != first:
        raise WrongRangeError(f"asked for bytes from {first:,} on, got HTTP {response.status_code} with others")
    return True


def _total_bytes(response: Any) -> int | None:
    stated = response.headers.get("Content-Range", "").rpartition("/")[2]
    if not stated and response.status_code == 200 and "Content-Encoding" not in response.headers:
        stated = response.headers.get("Content-Length", "")
    return int(stated) if stated.isdigit() else None


@contextmanager
def _appending(part: Path) -> Iterator[io.FileIO]:
    with _local_errors(part):
        out = io.FileIO(part, "a")
    with out:
        yield out


def _write_all(out: io.FileIO, piece: bytes, part: Path) -> None:
    view = memoryview(piece)
    with _local_errors(part):
        while view:
            view = view[out.write(view) :]


@contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into our errors; put around file operations alone, never around requests."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error
