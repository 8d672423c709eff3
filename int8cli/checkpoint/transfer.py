"""Bytes from the Hub over HTTP: ranges, downloads that go on where they stopped, retries, and failures in plain words.

Owns what one request to the Hub can do wrong and what follows from it. Knows URLs and files, nothing of repositories.
huggingface_hub brings session, headers and error classes; its own download starts from zero after each failure
(a temporary name per attempt since 2.x), which is why the loop over a body is here.
"""

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from int8cli.errors import (
    AccessDeniedError,
    DiskSpaceError,
    Int8cliError,
    ModelNotFoundError,
    OutputError,
    SourceError,
    TransferError,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")

# Where a server ignores Range, a header near the start of the file can still be had by reading up to it.
_MAX_SKIPPED_BYTES = 16 << 20
_LONGEST_WAIT_S = 600.0
_TRY_AGAIN = "Run the same command again: it goes on where this run stopped."


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


class _ShortBodyError(Exception):
    """A body ended before its end, without the connection saying so."""


class _WrongRangeError(Exception):
    """A server answered with other bytes than it was asked for."""


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
            raise TransferStoppedError(f"{self.what}: the transfer was stopped", hint=_TRY_AGAIN)

    def progressed(self) -> None:
        """Bytes have come: what failed before them no longer counts."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Pause before the next attempt; or raise, if another one would not help or there have been enough."""
        if isinstance(error, Int8cliError) or not _is_foreign(error):
            raise error
        if not is_transient(error):
            raise translated(error, self.what) from error
        self._failures += 1
        if self._failures >= self._policy.attempts:
            times = f"{self._failures} times in a row" if self._failures > 1 else "once"
            raise TransferError(f"{self.what}: failed {times}: {described(error)}", hint=_next_step(error)) from error
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
        failure: Exception = _ShortBodyError("the body ended early")
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
                raise _ShortBodyError(f"the body is longer than the {size_bytes:,} bytes announced")
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
        raise _WrongRangeError(f"asked for bytes from {first:,} on, got HTTP {response.status_code} with others")
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


def disk_error(path: Path, error: OSError) -> OutputError:
    """What to say when `path` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(
            f"The disk is full: {path.name} could not be written to {path.parent}",
            hint="Free some space and run the same command again: it goes on where this run stopped.",
        )
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}", hint="Check the directory and its permissions."
    )


def _is_foreign(error: Exception) -> bool:
    """Whether network, server or huggingface_hub caused the error; anything else is a bug and stays one."""
    httpx = _httpx()
    return isinstance(error, (_ShortBodyError, _WrongRangeError, httpx.HTTPError, httpx.InvalidURL, OSError))


def is_transient(error: Exception) -> bool:
    """Whether the same request may well succeed later: dropped connections, timeouts, 408, 429 and 5xx."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status: int = error.response.status_code
        return status in (408, 429) or status >= 500
    httpx = _httpx()
    passing = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
    return isinstance(error, (_ShortBodyError, _WrongRangeError, *passing))


def asked_pause_s(error: Exception) -> float | None:
    """How long the server asked to wait: Retry-After in seconds or as a date, or the Hub's `RateLimit: …;t=55`."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    asked = headers.get("Retry-After", "").strip()
    limited = re.search(r";\s*t=(\d+)", headers.get("RateLimit", "")) if error.response.status_code == 429 else None
    if asked.isdigit():
        pause_s = float(asked)
    elif asked:
        pause_s = _seconds_until(asked)
    elif limited:
        pause_s = float(limited[1])
    else:
        return None
    return min(max(pause_s, 0.0), _LONGEST_WAIT_S)


def _seconds_until(http_date: str) -> float:
    try:
        moment = parsedate_to_datetime(http_date)
    except ValueError:
        return 1.0
    return (moment - datetime.now(timezone.utc)).total_seconds()


def described(error: Exception) -> str:
    """A failure in a few words, without the URL (which may carry a signature)."""
    from huggingface_hub.errors import HfHubHTTPError

    httpx = _httpx()
    if isinstance(error, HfHubHTTPError):
        return f"the server answered {error.response.status_code} {error.response.reason_phrase}".strip()
    if isinstance(error, httpx.ConnectTimeout):
        return "the server could not be reached in time"
    if isinstance(error, httpx.TimeoutException):
        return "the server fell silent"
    if isinstance(error, httpx.ConnectError):
        return f"the server could not be reached ({error})"
    if isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError)):
        return "the connection was dropped"
    return str(error) or type(error).__name__


def translated(error: Exception, what: str) -> Int8cliError:
    """The error of our tree for one that huggingface_hub or httpx raised and that no retry will mend."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.OfflineModeIsEnabled):
        return TransferError(
            f"{what}: offline mode forbids asking the Hub", hint="Unset HF_HUB_OFFLINE, or fetch the model beforehand."
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return ModelNotFoundError(f"{what}: no such revision", hint="Give a branch, a tag or a full commit hash.")
    if isinstance(error, hub.EntryNotFoundError):
        return ModelNotFoundError(f"{what}: no such file in the repository", hint="The repository may be incomplete.")
    if isinstance(error, hub.GatedRepoError):
        return AccessDeniedError(
            f"{what}: the repository is gated",
            hint="Accept its terms on the model's page, then set HF_TOKEN or run `hf auth login`.",
        )
    if isinstance(error, hub.DisabledRepoError):
        return AccessDeniedError(f"{what}: the Hub has disabled this repository")
    if isinstance(error, hub.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"{what}: no such repository on the Hub, or it is private",
            hint="Check the name; for a private one, set HF_TOKEN or run `hf auth login`.",
        )
    if isinstance(error, hub.HfHubHTTPError):
        return _refused(error.response.status_code, described(error), what)
    if isinstance(error, OSError) and error.filename is not None:
        return disk_error(Path(error.filename), error)
    return TransferError(f"{what}: {described(error)}", hint="Check HF_ENDPOINT and the network.")


def _next_step(error: Exception) -> str:
    httpx = _httpx()
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return "Check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 makes do with the Hub cache."
    return _TRY_AGAIN


def _refused(status: int, description: str, what: str) -> SourceError:
    if status in (401, 403):
        return AccessDeniedError(
            f"{what}: {description}",
            hint="Check the name and the token: set HF_TOKEN or run `hf auth login` with an account that has access.",
        )
    if status in (404, 410):
        return ModelNotFoundError(f"{what}: {description}", hint="Check the name and the revision.")
    return TransferError(f"{what}: {description}", hint="Check HF_ENDPOINT and the network.")


def _httpx() -> ModuleType:
    """The HTTP library that this huggingface_hub is built on: httpx, or its successor httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    base = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    return sys.modules[base.__module__.partition(".")[0]]
