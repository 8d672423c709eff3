"""A checkpoint in an object store, or on any file system that fsspec knows, as a `Source`.

Owns how its files are listed, read by ranges and downloaded, and whether they are unchanged since their first use.
fsspec is imported inside functions. It finds credentials where each store's own tools do.
"""

import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.hub.ahead import FetchAhead
from int8cli.checkpoint.hub.download import GrowingFile
from int8cli.checkpoint.hub.download_directory import part_of
from int8cli.checkpoint.hub.options import HubOptions
from int8cli.checkpoint.hub.upload_failures import shortened
from int8cli.checkpoint.own_files import opened_directory, remove_empty_directories, remove_file
from int8cli.checkpoint.reader import size_of
from int8cli.checkpoint.source import LocalFile, SourceIdentity, checked_file_name, is_hidden
from int8cli.errors import (
    AccessDeniedError,
    CorruptShardError,
    Int8cliError,
    MissingExtraError,
    ModelNotFoundError,
    TransferError,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from fsspec import AbstractFileSystem

T = TypeVar("T")

_PIECE_BYTES = 16 << 20
_READ_AHEAD_BYTES = 128 << 10  # for `.bin`, whose directory and pickle are read in small pieces
_EXACT_SUFFIX = ".safetensors"
# What stores say of an object's content. The first that is there is compared; sizes always are.
_MARKS = ("ETag", "etag", "md5Hash", "md5", "generation", "LastModified", "last_modified", "mtime", "created")
_TRY_AGAIN = "Run the same command again: it resumes where this run stopped."


@dataclass(frozen=True, slots=True)
class _Entry:
    """An object: its path in the store, its size, and what the store says of its content."""

    path: str
    size_bytes: int
    mark: str


class RemoteSource:
    """The files below a URL such as s3://bucket/model. A file must not change after it was first used.

    `options` say where downloads go, and how long a transfer that fails is tried again.
    """

    def __init__(self, url: str, options: HubOptions) -> None:
        """Lists the files. Raises ModelNotFoundError, AccessDeniedError, TransferError, MissingExtraError."""
        self._url = url.rstrip("/")
        self._options = options
        self._stop = Event()
        self._lock = Lock()
        self._fs, root = _opened(self._url)
        self._root = root.rstrip("/")
        self._entries = self._call(self._listed, self._url)
        if not self._entries:
            raise ModelNotFoundError(f"{self._url}: no such directory, or no files in it", hint="Check the address.")
        self._ahead = FetchAhead(self._local_file, self._stop)

    @property
    def identity(self) -> SourceIdentity:
        return SourceIdentity(name=self._url.rpartition("/")[2] or "model", revision=None, on_hub=False)

    @property
    def keeps_in(self) -> Path | None:
        return None

    def list_files(self) -> tuple[str, ...]:
        return tuple(sorted(self._entries))

    def size_bytes(self, file_name: str) -> int:
        return self._entry(file_name).size_bytes

    def open(self, file_name: str) -> BinaryIO:
        entry = self._entry(file_name)
        reader = _RangeReader(entry.size_bytes, lambda start, end: self._range(file_name, entry, start, end))
        if file_name.endswith(_EXACT_SUFFIX):
            return cast(BinaryIO, reader)
        return io.BufferedReader(reader, _READ_AHEAD_BYTES)

    @contextmanager
    def fetch(self, file_name: str) -> Iterator[LocalFile]:
        self._ahead.wait_for(checked_file_name(file_name))
        yield self._local_file(file_name)
        self.discard(file_name)

    def transfers(self, file_name: str) -> bool:
        return True

    def prefetch(self, file_name: str) -> None:
        self._ahead.start(checked_file_name(file_name))

    def discard(self, file_name: str) -> None:
        path = self._place(file_name)
        for each in (path, part_of(path)):
            with disk_errors(each):
                remove_file(each, self._options.downloads.below)

    def close(self) -> None:
        self._stop.set()
        self._ahead.close()
        downloads = self._options.downloads
        remove_empty_directories(downloads.path, downloads.below)

    def _listed(self) -> dict[str, _Entry]:
        self._fs.invalidate_cache()
        found: Mapping[str, Mapping[str, Any]] = self._fs.find(self._root, detail=True)
        names = {path[len(self._root) :].lstrip("/"): path for path in found}
        entries = {name: _entry_of(path, found[path]) for name, path in names.items() if name and not is_hidden(name)}
        return {name: entry for name, entry in entries.items() if found[entry.path].get("type") == "file"}

    def _entry(self, file_name: str) -> _Entry:
        entry = self._entries.get(checked_file_name(file_name))
        if entry is None:
            raise ModelNotFoundError(
                f"{self.identity.name}: {file_name!r} is missing", hint="The checkpoint may be incomplete."
            )
        return entry

    def _local_file(self, file_name: str) -> LocalFile:
        """The file, downloaded unless an earlier run has downloaded all of it."""
        entry, path = self._entry(file_name), self._place(file_name)
        if not (os.path.isfile(path) and size_of(path) == entry.size_bytes):
            self._download(file_name, entry, part_of(path))
            below = self._options.downloads.below
            with disk_errors(path), opened_directory(path.parent, below) as directory:
                os.replace(part_of(path).name, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        return LocalFile(path)

    def _download(self, file_name: str, entry: _Entry, part: Path) -> None:
        with GrowingFile.opened(part, self._options.downloads.below) as out:
            if out.size_bytes > entry.size_bytes:
                out.empty()
            while (start := out.size_bytes) < entry.size_bytes:
                piece = self._range(file_name, entry, start, min(start + _PIECE_BYTES, entry.size_bytes))
                out.append(piece)
                if self._options.on_bytes is not None:
                    self._options.on_bytes(file_name, len(piece))
        self._require_unchanged(file_name, entry)

    def _range(self, file_name: str, entry: _Entry, start: int, end: int) -> bytes:
        def read() -> bytes:
            data: bytes = self._fs.cat_file(entry.path, start=start, end=end)
            if len(data) != end - start:
                self._require_unchanged(file_name, entry)
                raise EOFError(f"{len(data):,} bytes came instead of {end - start:,}")
            return data

        return self._call(read, f"{self.identity.name}: {file_name}")

    def _require_unchanged(self, file_name: str, entry: _Entry) -> None:
        """Raise CorruptShardError if the object was replaced since its first use."""

        def read() -> _Entry:
            with self._lock:
                self._fs.invalidate_cache()
                return _entry_of(entry.path, self._fs.info(entry.path))

        if self._call(read, f"{self.identity.name}: {file_name}") != entry:
            self.discard(file_name)
            raise CorruptShardError(
                f"{file_name}: changed while it was read",
                hint="Wait until nothing writes to it, then run the same command again.",
            )

    def _place(self, file_name: str) -> Path:
        """Where a file is downloaded to. Contains its mark, so that a part of another object is never resumed."""
        entry = self._entry(file_name)
        mark = sha256(f"{self._url} {entry.size_bytes} {entry.mark}".encode()).hexdigest()[:16]
        return self._options.downloads.path / mark / file_name

    def _call(self, request: Callable[[], T], what: str) -> T:
        """The result of a request, which is repeated after failures that may be transient."""
        policy, failures, since_s = self._options.retry, 0, time.monotonic()
        while True:
            if self._stop.is_set():
                raise TransferError(f"{what}: the transfer was stopped", hint=_TRY_AGAIN)
            try:
                return request()
            except Int8cliError:
                raise
            except Exception as error:
                _refuse_final(error, what, self._url)
                failures += 1
                if policy.gives_up(failures, time.monotonic() - since_s):
                    message = f"{what}: failed {failures} times in a row: {_said(error)}"
                    raise TransferError(message, hint=_TRY_AGAIN) from error
                pause_s = policy.pause_s(failures)
                if self._options.on_wait is not None:
                    self._options.on_wait(what, _said(error), pause_s)
                self._stop.wait(pause_s)


class _RangeReader(io.RawIOBase):
    """An object as a seekable stream. Each read is one request for exactly that range."""

    def __init__(self, size_bytes: int, read_range: Callable[[int, int], bytes]) -> None:
        self._size_bytes = size_bytes
        self._read_range = read_range
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self._size_bytes)
        if end <= self._position:
            return 0
        data = self._read_range(self._position, end)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        return self.read(max(0, self._size_bytes - self._position)) or b""  # one request


def is_remote(model: str) -> bool:
    """Whether a MODEL argument is an address in a store, rather than a path or the name of a Hub repository."""
    protocol, found, _ = model.partition("://")
    return bool(found) and protocol.isalnum() and protocol.lower() not in ("http", "https", "hf", "file")


def _opened(url: str) -> "tuple[AbstractFileSystem, str]":
    try:
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(url)
    except ImportError as error:
        raise MissingExtraError(
            f"{url}: {shortened(str(error))}", hint="Install the package that fsspec needs for this kind of address."
        ) from error
    except ValueError as error:
        raise ModelNotFoundError(
            f"{url}: {shortened(str(error))}", hint="MODEL is a Hub id (org/name), a directory, or an address as s3://…"
        ) from error
    return fs, root


def _entry_of(path: str, info: Mapping[str, Any]) -> _Entry:
    mark = next((str(info[name]) for name in _MARKS if info.get(name)), "")
    return _Entry(path, int(info["size"]), mark)


def _refuse_final(error: Exception, what: str, url: str) -> None:
    """Raise the error for a failure that no retry helps."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        raise ModelNotFoundError(f"{what}: no such object", hint=f"Check {url}.") from error
    if isinstance(error, PermissionError) or type(error).__name__ in ("NoCredentialsError", "TokenRetrievalError"):
        raise AccessDeniedError(
            f"{what}: {_said(error)}", hint="Set the credentials as the tools of this store expect them."
        ) from error
    if isinstance(error, (TypeError, AttributeError, KeyError, AssertionError)):  # bugs
        raise error


def _said(error: Exception) -> str:
    return shortened(str(error)) or type(error).__name__
