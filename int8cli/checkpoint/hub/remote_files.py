"""The files of a repository over the network: their metadata, ranges and contents.

Owns the requests for a file. Does not know where files are stored on this machine.
"""

import os
from io import BufferedReader, BytesIO
from pathlib import Path
from threading import Event
from typing import BinaryIO, cast

from int8cli.checkpoint.digest import git_sha1
from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.hub.download import download
from int8cli.checkpoint.hub.options import HubOptions
from int8cli.checkpoint.hub.published import Published, ask
from int8cli.checkpoint.hub.ranges import RangeReader, read_range
from int8cli.checkpoint.hub.repository import Repository
from int8cli.checkpoint.hub.requests import RemoteFile
from int8cli.checkpoint.hub.retries import Retries
from int8cli.checkpoint.own_files import remove_file
from int8cli.errors import DigestMismatchError, TransferError

# A safetensors header is two reads of known length. Nothing is read ahead, so that no weights are transferred. The
# directory and pickle of a `.bin` are read in small pieces, each of which would be a request without read-ahead.
_EXACT_SUFFIX = ".safetensors"
_READ_AHEAD_BYTES = 128 << 10
# A config or an index is read completely and compared with its digest.
_WHOLE_SUFFIX = ".json"
_WHOLE_LIMIT_BYTES = 256 << 20
_ATTEMPTS = 2  # how often a file with a wrong digest is downloaded


class RemoteFiles:
    """Access to a repository's files by name. Every method raises ModelNotFoundError in offline mode."""

    def __init__(self, repository: Repository, options: HubOptions, stop: Event) -> None:
        self._repository = repository
        self._options = options
        self._stop = stop
        self._published: dict[str, Published] = {}

    def published(self, file_name: str) -> Published:
        """The Hub's size and etag of the file. The Hub is asked only once."""
        if file_name not in self._published:
            self._repository.require_online(file_name)
            self._published[file_name] = self._ask(file_name)
        return self._published[file_name]

    def open(self, file_name: str) -> BinaryIO:
        """A seekable view of the file. Only the ranges that are read are transferred."""
        self._repository.require_online(file_name)
        if file_name.endswith(_WHOLE_SUFFIX) and self.published(file_name).size_bytes <= _WHOLE_LIMIT_BYTES:
            return BytesIO(self._read_all(file_name))
        reader = RangeReader(
            self._remote(file_name), self.retries(file_name), lambda: self.published(file_name).size_bytes
        )
        if file_name.endswith(_EXACT_SUFFIX):
            return cast(BinaryIO, reader)
        return BufferedReader(reader, _READ_AHEAD_BYTES)

    def download(self, file_name: str, part: Path, below: Path) -> None:
        """Download the file to `part`, inside the directory `below`, resuming after the bytes that `part` has.

        The digest of a small file is compared here, and that of a shard by whoever reads it; but bytes of an earlier
        run may be other ones since a power failure, so with them it is compared here as well.
        """
        report = self._options.on_bytes
        on_bytes = None if report is None else lambda n: report(file_name, n)
        published = self.published(file_name)
        for _ in range(_ATTEMPTS):
            resumed = os.path.lexists(part)
            download(
                self._remote(file_name), part, published.size_bytes, self.retries(file_name), on_bytes, below=below
            )
            if (published.git_sha1 is None and not resumed) or published.has_digest_of(part):
                return
            with disk_errors(part):
                remove_file(part, below)
        raise self._not_as_published(file_name)

    def _read_all(self, file_name: str) -> bytes:
        """All bytes of a small file."""
        published = self.published(file_name)
        for _ in range(_ATTEMPTS):
            data = bytes(read_range(self._remote(file_name), 0, published.size_bytes, self.retries(file_name)).data)
            if len(data) == published.size_bytes and published.git_sha1 in (None, git_sha1(data)):
                return data
        raise self._not_as_published(file_name)

    def _not_as_published(self, file_name: str) -> DigestMismatchError:
        return DigestMismatchError(
            f"{self._repository.label(file_name)}: the server sends other bytes than those that were published",
            hint="Check whether there is a log-in page or a proxy between here and the Hub.",
        )

    def retries(self, file_name: str) -> Retries:
        """A new count of failures, for one transfer of the file."""
        return Retries(self._options.retry, self._repository.label(file_name), self._stop, self._options.on_wait)

    def _ask(self, file_name: str) -> Published:
        retries = self.retries(file_name)
        answer = retries.call(lambda: ask(self._remote(file_name)))
        size_bytes = answer.size_bytes
        if size_bytes is None:
            size_bytes = read_range(self._remote(file_name), 0, 1, retries).total_bytes
        label = self._repository.label(file_name)
        if answer.commit is None:  # all servers with the Hub's API send the commit; log-in pages do not
            raise TransferError(
                f"{label}: the server does not answer like a Hub",
                hint="Check HF_ENDPOINT, and whether there is a log-in page or a proxy between here and the Hub.",
            )
        if size_bytes is None:
            raise TransferError(f"{label}: the server does not send the size of the file")
        return Published(size_bytes, answer.etag)

    def _remote(self, file_name: str) -> RemoteFile:
        return RemoteFile(self._url(file_name), self._options.request_headers(), self._options.request_timeout_s)

    def _url(self, file_name: str) -> str:
        from huggingface_hub import hf_hub_url

        repository = self._repository
        return hf_hub_url(repository.repo_id, file_name, revision=repository.commit, endpoint=self._options.endpoint)
