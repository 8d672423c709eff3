"""A checkpoint on the Hugging Face Hub as a `Source`.

Owns where a file comes from (the Hub cache or a download), and when it is removed. Knows no file format.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import BinaryIO

from int8cli.checkpoint.hub.ahead import FetchAhead
from int8cli.checkpoint.hub.cache import HubCache, blob_sha256
from int8cli.checkpoint.hub.download_directory import DownloadDirectory, part_of
from int8cli.checkpoint.hub.options import HubOptions
from int8cli.checkpoint.hub.remote_files import RemoteFiles
from int8cli.checkpoint.hub.repository import Repository
from int8cli.checkpoint.reader import open_to_read, size_of
from int8cli.checkpoint.source import LocalFile, SourceIdentity, checked_file_name


class HubSource:
    """A repository on the Hub at one commit: the one that the revision named at the first request.

    Files that are in the Hub cache at that commit are used from there and never removed. With HF_HUB_OFFLINE, only
    cached files are available.
    """

    def __init__(self, repo_id: str, revision: str | None, options: HubOptions) -> None:
        """Makes no request."""
        self._options = options
        self._stop = Event()
        self._repository = Repository(repo_id, revision, options, self._stop)
        self._remote = RemoteFiles(self._repository, options, self._stop)
        self._cache = HubCache(self._repository, self._remote, options)
        self._downloads = DownloadDirectory(options.downloads, self._repository, self._remote)
        self._ahead = FetchAhead(self._local_file, self._stop)

    def resolve(self) -> None:
        """Request the commit now instead of at first use.

        Raises ModelNotFoundError, AccessDeniedError or TransferError.
        """
        _ = self._repository.snapshot

    @property
    def identity(self) -> SourceIdentity:
        return SourceIdentity(name=self._repository.repo_id, revision=self._repository.commit, on_hub=True)

    @property
    def keeps_in(self) -> Path | None:
        return self._options.hub_cache if self._options.keep_source else None

    def list_files(self) -> tuple[str, ...]:
        return self._repository.snapshot.files

    def size_bytes(self, file_name: str) -> int:
        cached = self._cache.find(checked_file_name(file_name))
        return size_of(cached) if cached is not None else self._remote.published(file_name).size_bytes

    def open(self, file_name: str) -> BinaryIO:
        cached = self._cache.find(checked_file_name(file_name))
        return open_to_read(cached, file_name) if cached is not None else self._remote.open(file_name)

    @contextmanager
    def fetch(self, file_name: str) -> Iterator[LocalFile]:
        self._ahead.wait_for(checked_file_name(file_name))
        local = self._local_file(file_name)
        yield local
        if local.path == self._downloads.path(file_name):
            self._downloads.remove(file_name)

    def transfers(self, file_name: str) -> bool:
        return self._cache.find(file_name) is None

    def downloads(self, file_name: str) -> tuple[Path, ...]:
        if self._cache.find(checked_file_name(file_name)) is not None:
            return ()
        place = self._cache.place(file_name) if self._options.keep_source else self._downloads.path(file_name)
        return part_of(place), place

    def prefetch(self, file_name: str) -> None:
        """At most one file is fetched at a time: during a fetch, a call for another file does nothing."""
        self._ahead.start(checked_file_name(file_name))

    def discard(self, file_name: str) -> None:
        cached = self._cache.find(checked_file_name(file_name))
        if cached is None:
            self._downloads.remove(file_name)
        else:
            self._cache.discard(file_name, cached)

    def close(self) -> None:
        """Stop a transfer in the background. Its part stays; without parts the download directory is removed."""
        self._stop.set()
        self._ahead.close()
        self._downloads.remove_empty_directories()

    def _local_file(self, file_name: str) -> LocalFile:
        """The file in the Hub cache, or else downloaded."""
        cached = self._cache.find(file_name)
        if cached is None:
            download = self._cache.download if self._options.keep_source else self._downloads.download
            return LocalFile(download(file_name), self._remote.published(file_name).sha256)
        sha256 = blob_sha256(cached)
        if sha256 is None and not self._repository.snapshot.offline:
            sha256 = self._remote.published(file_name).sha256
        return LocalFile(cached, sha256)
