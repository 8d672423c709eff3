"""An object store, or any other file system that fsspec knows, by its address.

Owns the requests, which of them are repeated, and what their failures mean. fsspec is imported inside functions. It
finds credentials where each store's own tools do.
"""

import errno
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any, TypeVar

from int8cli.checkpoint.hub.retries import RetryPolicy
from int8cli.checkpoint.hub.upload_failures import shortened
from int8cli.errors import AccessDeniedError, Int8cliError, MissingExtraError, ModelNotFoundError, TransferError

T = TypeVar("T")

# What stores say of an object's content. The first that is there is compared; sizes always are.
_MARKS = ("ETag", "etag", "md5Hash", "md5", "generation", "LastModified", "last_modified", "mtime", "created")
# What a driver raises that has a bug, or an answer of another form than it expects: a retry helps neither.
_OF_THE_DRIVER = (TypeError, AttributeError, LookupError, AssertionError, ImportError, NotImplementedError)
# What a file system refuses now and in three hours. Others may pass: drivers give what a server said such numbers too.
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP)
_DIRECTORIES = 4  # that may have to be made for one file
_PASSWORD = re.compile(r"(?<=://)([^/@:]*):[^/@]*@")
_TRY_AGAIN = "Run the same command again: it resumes where this run stopped."


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object: its path in the store, its size, and what the store says of its content."""

    path: str
    size_bytes: int
    mark: str


class ObjectStore:
    """The objects below a URL such as s3://bucket/model.

    Every method raises ModelNotFoundError for a missing object, AccessDeniedError, and TransferError for failures that
    did not end. `on_wait(what, why, pause_s)` hears of each pause before a retry. `url` is the address without a
    password.
    """

    def __init__(self, url: str, retry: RetryPolicy, on_wait: Callable[[str, str, float], None] | None = None) -> None:
        """Makes no request. Raises ModelNotFoundError for an unknown kind of address, MissingExtraError."""
        self.url = shown_address(url.rstrip("/"))
        self.name = self.url.rpartition("/")[2] or "model"
        self._retry = retry
        self._on_wait = on_wait
        self._stop = Event()
        self._lock = Lock()
        self._fs, root = _opened(url.rstrip("/"))
        self._root = root.rstrip("/")

    @property
    def directory(self) -> Path | None:
        """The directory of this machine that the address names; None if it names no such thing."""
        from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]  # no types

        return Path(self._root) if isinstance(self._fs, LocalFileSystem) else None

    @property
    def stopped(self) -> Event:
        """Set by `close`."""
        return self._stop

    def files(self) -> dict[str, str]:
        """The path of each object below the address by its name. Empty if there are none."""

        def find() -> dict[str, str]:
            self._fs.invalidate_cache()
            found: Mapping[str, Mapping[str, Any]] = self._fs.find(self._root, detail=True)
            paths = [path for path, info in found.items() if info.get("type") == "file"]
            return {path.removeprefix(self._root).lstrip("/"): path for path in paths}

        return self.call(find, self.url)

    def ask(self, file_name: str, path: str) -> StoredObject:
        """What the store says of an object now."""

        def info() -> StoredObject:
            with self._lock:  # a listing that is kept would hide a change
                self._fs.invalidate_cache()
                found: Mapping[str, Any] = self._fs.info(path)
            mark = next((str(found[name]) for name in _MARKS if found.get(name)), "")
            size_bytes = int(found["size"])
            if size_bytes < 0:
                raise TypeError(f"its size is {size_bytes}")
            return StoredObject(path, size_bytes, mark)

        return self.call(info, f"{self.name}: {file_name}")

    def read(self, path: str, start: int, end: int) -> bytes:
        """The bytes of a range, in one request that is not repeated."""
        data: bytes = self._fs.cat_file(path, start=start, end=end)
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"it read {type(data).__name__}, not bytes")
        return data

    def write(self, local: Path, file_name: str) -> StoredObject:
        """Write a file of this machine, in parts where the store has them, and return what the store says of it.

        The object appears once it is complete.
        """
        path = self.path_of(file_name)

        def put() -> None:
            for _ in range(_DIRECTORIES):
                with suppress(FileExistsError):  # drivers look for a directory, then make it: another one was quicker
                    return self._put(str(local), path)
            return self._put(str(local), path)

        self.call(put, f"{self.name}: {file_name}")
        return self.ask(file_name, path)

    def _put(self, local: str, path: str) -> None:
        """Write a file. A file system with directories gets those below the address, and never a bucket."""
        try:
            self._fs.put_file(local, path)
        except FileNotFoundError:
            if not self._fs.isdir(self._root.rpartition("/")[0]):
                raise
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(local, path)

    def remove(self, file_name: str) -> None:
        """Remove an object, if it is there."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self.path_of(file_name))

        self.call(remove, f"{self.name}: {file_name}")

    def path_of(self, file_name: str) -> str:
        """The path of an object, whether or not there is one."""
        return f"{self._root}/{file_name}"

    def call(self, request: Callable[[], T], what: str) -> T:
        """The result of a request, which is repeated after failures that may be transient."""
        failures, since_s = 0, time.monotonic()
        while True:
            if self._stop.is_set():
                raise TransferError(f"{what}: the transfer was stopped", hint=_TRY_AGAIN)
            try:
                return request()
            except Int8cliError:
                raise
            except Exception as error:
                _refuse_final(error, what, self.url)
                failures += 1
                if self._retry.gives_up(failures, time.monotonic() - since_s):
                    message = f"{what}: failed {failures} times in a row: {_said(error)}"
                    raise TransferError(message, hint=_TRY_AGAIN) from error
                pause_s = self._retry.pause_s(failures)
                if self._on_wait is not None:
                    self._on_wait(what, _said(error), pause_s)
                self._stop.wait(pause_s)

    def close(self) -> None:
        """End the wait before a retry."""
        self._stop.set()


def is_remote(model: str) -> bool:
    """Whether a MODEL argument is an address in a store, rather than a path or the name of a Hub repository."""
    protocol, _, path = model.partition("://")
    return bool(path.strip("/")) and protocol.isalnum() and protocol.lower() not in ("http", "https", "hf", "file")


def shown_address(url: str) -> str:
    """An address as it may be shown and recorded: without a password, as in sftp://user:password@host/model."""
    return _PASSWORD.sub(r"\1:…@", url)


def _opened(url: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it."""
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # fsspec has no types

        fs, root = url_to_fs(url)
    except MemoryError:
        raise
    except ImportError as error:
        raise MissingExtraError(
            f"{shown_address(url)}: {_said(error)}",
            hint="Install the package that fsspec needs for this kind of address.",
        ) from error
    except ValueError as error:
        raise ModelNotFoundError(
            f"{shown_address(url)}: {_said(error)}",
            hint="MODEL is a Hub id (org/name), a directory, or an address.",
        ) from error
    except Exception as error:  # whatever a driver raises that parses the address, or connects at once
        raise TransferError(
            f"{shown_address(url)}: cannot be opened: {type(error).__name__}: {_said(error)}",
            hint="Check the address, and that its server can be reached.",
        ) from error
    return fs, str(root)


def _refuse_final(error: Exception, what: str, url: str) -> None:
    """Raise the error for a failure that no retry helps."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        raise ModelNotFoundError(f"{what}: no such object", hint=f"Check {url}.") from error
    if isinstance(error, FileExistsError):  # drivers raise it without a number, too
        raise TransferError(
            f"{what}: {_said(error)}",
            hint=f"Something else is already at that path under {url}. Remove it, or choose another address.",
        ) from error
    if isinstance(error, PermissionError) or type(error).__name__ in ("NoCredentialsError", "TokenRetrievalError"):
        raise AccessDeniedError(
            f"{what}: {_said(error)}", hint="Set the credentials as the tools of this store expect them."
        ) from error
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, OSError) and error.errno in _LASTING:
        hint = "Make room there, or choose another address, and run the command again."
        raise TransferError(f"{what}: {_said(error)}", hint=hint) from error
    if isinstance(error, _OF_THE_DRIVER):
        raise TransferError(
            f"{what}: the file system that fsspec has for it failed: {type(error).__name__}: {_said(error)}",
            hint="It may have got an answer that it does not expect. Check the address and its package.",
        ) from error


def _said(error: Exception) -> str:
    return shortened(shown_address(str(error))) or type(error).__name__
