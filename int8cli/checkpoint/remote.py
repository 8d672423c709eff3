"""A checkpoint in an object store, or on any file system that fsspec knows, as a `Source`.

Owns how its files are read by ranges and downloaded, and whether they are unchanged since their first use.
"""

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, cast

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.hub.ahead import FetchAhead
from int8cli.checkpoint.hub.download import GrowingFile
from int8cli.checkpoint.hub.download_directory import part_of
from int8cli.checkpoint.hub.options import HubOptions
from int8cli.checkpoint.object_store import ObjectStore, StoredObject
from int8cli.checkpoint.own_files import opened_directory, remove_empty_directories, remove_file
from int8cli.checkpoint.range_stream import RangeStream
from int8cli.checkpoint.reader import size_of
from int8cli.checkpoint.source import LocalFile, SourceIdentity, checked_file_name, is_hidden
from int8cli.errors import CorruptShardError, ModelNotFoundError

_PIECE_BYTES = 16 << 20
_READ_AHEAD_BYTES = 128 << 10  # for `.bin`, whose directory and pickle are read in small pieces
_EXACT_SUFFIX = ".safetensors"


class StoreSource:
    """The files below a URL such as s3://bucket/model. A file must not change after it was first used.

    `options` say where downloads go, and how long a transfer that fails is tried again.
    """

    def __init__(self, url: str, options: HubOptions) -> None:
        """Lists the files. Raises ModelNotFoundError, AccessDeniedError, TransferError, MissingExtraError."""
        self._options = options
        self._store = ObjectStore(url, options.retry, options.on_wait)
        self._paths = {name: path for name, path in self._store.files().items() if name and not is_hidden(name)}
        self._objects: dict[str, StoredObject] = {}
        if not self._paths:
            raise ModelNotFoundError(
                f"{self._store.url}: no such directory, or no files in it", hint="Check the address."
            )
        self._ahead = FetchAhead(self._local_file, self._store.stopped)

    @property
    def identity(self) -> SourceIdentity:
        return SourceIdentity(name=self._store.name, revision=None, on_hub=False)

    @property
    def keeps_in(self) -> Path | None:
        return None

    def list_files(self) -> tuple[str, ...]:
        return tuple(sorted(self._paths))

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

    def downloads(self, file_name: str) -> tuple[Path, ...]:
        place = self._place(file_name)
        return part_of(place), place

    def prefetch(self, file_name: str) -> None:
        self._ahead.start(checked_file_name(file_name))

    def discard(self, file_name: str) -> None:
        for each in self.downloads(file_name):
            with disk_errors(each):
                remove_file(each, self._options.downloads.below)

    def close(self) -> None:
        self._store.close()
        self._ahead.close()
        downloads = self._options.downloads
        remove_empty_directories(downloads.path, downloads.below)

    def _entry(self, file_name: str) -> StoredObject:
        """What the store said of a file at its first use."""
        path = self._paths.get(checked_file_name(file_name))
        if path is None:
            raise ModelNotFoundError(
                f"{self.identity.name}: {file_name!r} is missing", hint="The checkpoint may be incomplete."
            )
        if file_name not in self._objects:
            self._objects.setdefault(file_name, self._store.ask(file_name, path))
        return self._objects[file_name]

    def _local_file(self, file_name: str) -> LocalFile:
        """The file, downloaded unless an earlier run has downloaded all of it."""
        entry, path = self._entry(file_name), self._place(file_name)
        if not (os.path.isfile(path) and size_of(path) == entry.size_bytes):
            self._download(file_name, entry, part_of(path))
            below = self._options.downloads.below
            with disk_errors(path), opened_directory(path.parent, below) as directory:
                os.replace(part_of(path).name, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        return LocalFile(path)

    def _download(self, file_name: str, entry: StoredObject, part: Path) -> None:
        """Download the file to `part`, resuming after the bytes that are surely on the disk.

        Stores publish no digest that could be compared. So each piece is on the disk before the next one is appended,
        and only the last one can be other bytes after a power failure.
        """
        with GrowingFile.opened(part, self._options.downloads.below) as out, ThreadPoolExecutor(1) as disk:
            if out.size_bytes > entry.size_bytes:
                out.empty()
            out.shorten(_PIECE_BYTES)
            on_disk = disk.submit(out.sync)
            while (start := out.size_bytes) < entry.size_bytes:
                piece = self._range(file_name, entry, start, min(start + _PIECE_BYTES, entry.size_bytes))
                on_disk.result()
                out.append(piece)
                on_disk = disk.submit(out.sync)
                if self._options.on_bytes is not None:
                    self._options.on_bytes(file_name, len(piece))
            on_disk.result()
        self._require_unchanged(file_name, entry)

    def _range(self, file_name: str, entry: StoredObject, start: int, end: int) -> bytes:
        def read() -> bytes:
            data = self._store.read(entry.path, start, end)
            if len(data) != end - start:
                self._require_unchanged(file_name, entry)
                raise EOFError(f"{len(data):,} bytes came instead of {end - start:,}")
            return data

        return self._store.call(read, f"{self._store.name}: {file_name}")

    def _require_unchanged(self, file_name: str, entry: StoredObject) -> None:
        """Raise CorruptShardError if the object was replaced since its first use."""
        if self._store.ask(file_name, entry.path) != entry:
            self.discard(file_name)
            raise CorruptShardError(
                f"{file_name}: changed while it was read",
                hint="Wait until nothing writes to it, then run the same command again.",
            )

    def _place(self, file_name: str) -> Path:
        """Where a file is downloaded to. Contains its mark, so that a part of another object is never resumed."""
        entry = self._entry(file_name)
        mark = sha256(f"{self._store.url} {entry.size_bytes} {entry.mark}".encode()).hexdigest()[:20]
        return self._options.downloads.path / mark / file_name  # no directory of a process has a name of this length


class _RangeReader(RangeStream):
    """An object as a stream."""

    def __init__(self, size_bytes: int, read_range: Callable[[int, int], bytes]) -> None:
        super().__init__(size_bytes)
        self._between = read_range

    def _read_range(self, start: int, length: int) -> bytes:
        return self._between(start, start + length)
