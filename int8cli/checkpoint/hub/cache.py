"""A repository's files in the Hub cache, which other programs share.

Owns how a file is added to the cache as huggingface_hub does it, and which files this program added and may remove.
"""

import os
from pathlib import Path

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.hub.download_directory import part_of
from int8cli.checkpoint.hub.options import HubOptions
from int8cli.checkpoint.hub.published import SHA256
from int8cli.checkpoint.hub.remote_files import RemoteFiles
from int8cli.checkpoint.hub.repository import PLAIN_NAME, Repository
from int8cli.checkpoint.own_files import sync_file
from int8cli.errors import CorruptShardError, TransferError


class HubCache:
    """The files of one repository, at its commit, in the Hub cache."""

    def __init__(self, repository: Repository, remote: RemoteFiles, options: HubOptions) -> None:
        self._repository = repository
        self._remote = remote
        self._options = options
        self._downloaded: set[str] = set()

    def find(self, file_name: str) -> Path | None:
        """The file; None if it is not in the cache."""
        from huggingface_hub import try_to_load_from_cache

        repository = self._repository
        found = try_to_load_from_cache(
            repository.repo_id, file_name, cache_dir=self._options.cache_dir, revision=repository.commit
        )
        return Path(found) if isinstance(found, str) else None

    def download(self, file_name: str) -> Path:
        """Download the blob to its place in the cache, and let huggingface_hub link it into the snapshot.

        Uses the same lock as huggingface_hub.
        """
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # public, not marked so

        etag = self._remote.published(file_name).etag
        if not PLAIN_NAME.fullmatch(etag):
            raise TransferError(
                f"{self._repository.label(file_name)}: the server sends no usable ETag, so the file cannot be cached",
                hint="Run without keeping the source.",
            )
        blob, lock = self._blob(etag), self._lock(etag)
        with disk_errors(lock.parent):
            lock.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(blob), WeakFileLock(lock):
            if not blob.exists():
                self._remote.download(file_name, part_of(blob), blob.parent)
                sync_file(part_of(blob))
                os.replace(part_of(blob), blob)
                self._downloaded.add(file_name)
        path = self._remote.retries(file_name).call(lambda: self._link_to_blob(file_name))
        self._remember_revision()
        return path

    def place(self, file_name: str) -> Path:
        """Where the bytes of a file are once they are complete."""
        return self._blob(self._remote.published(file_name).etag)

    def discard(self, file_name: str, cached: Path) -> None:
        """Remove a file that this object downloaded. Raises CorruptShardError for others, which programs may use."""
        if file_name not in self._downloaded:
            raise CorruptShardError(
                f"{self._repository.label(file_name)}: the copy in the Hub cache differs from the published file",
                hint=f"Delete {os.path.realpath(cached)} and run the same command again.",
            )
        cached.unlink()
        self._blob(self._remote.published(file_name).etag).unlink(missing_ok=True)
        self._downloaded.discard(file_name)

    @property
    def _folder(self) -> Path:
        """The repository's directory: https://huggingface.co/docs/huggingface_hub/guides/manage-cache."""
        return self._options.hub_cache / f"models--{self._repository.repo_id.replace('/', '--')}"

    def _blob(self, etag: str) -> Path:
        return self._folder / "blobs" / etag

    def _lock(self, etag: str) -> Path:
        return self._folder.parent / ".locks" / self._folder.name / f"{etag}.lock"

    def _link_to_blob(self, file_name: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(
                hf_hub_download(
                    self._repository.repo_id,
                    file_name,
                    revision=self._repository.commit,
                    cache_dir=self._options.cache_dir,
                    endpoint=self._options.endpoint,
                    token=self._options.token,
                    library_name="int8cli",
                )
            )
        except LocalEntryNotFoundError as error:  # wraps the network's error, which decides whether to retry
            raise error.__cause__ or error from None

    def _remember_revision(self) -> None:
        """Record which commit the revision names, as huggingface_hub does. Offline runs find the model by it."""
        revision, commit = self._repository.revision or "main", self._repository.commit
        if revision == commit or not all(map(PLAIN_NAME.fullmatch, revision.split("/"))):
            return
        ref = self._folder / "refs" / revision
        with disk_errors(ref):
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)


def blob_sha256(cached: Path) -> str | None:
    """The published sha256 of a cached LFS file, which is the name of the blob that its link in the snapshot names.

    Only this link is read: a blob may itself be a link into a store that uses other hashes.
    """
    if not cached.is_symlink():
        return None
    blob = Path(os.readlink(cached))
    return blob.name if blob.parent.name == "blobs" and SHA256.fullmatch(blob.name) else None
