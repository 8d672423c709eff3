"""A checkpoint on the Hugging Face Hub, read and fetched through huggingface_hub.

Owns which commit is read, where a fetched file lies (the Hub cache or a directory of ours), and when it goes again.
What a single transfer does is `transfer`'s. Knows no file format. huggingface_hub is imported where it is used: it
takes longer to import than `--help` may last.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, BinaryIO, cast
from urllib.parse import quote

from int8cli.checkpoint.failures import disk_error
from int8cli.checkpoint.source import LocalFile, SourceIdentity, checked_file_name, is_hidden
from int8cli.checkpoint.transfer import (
    RangeReader,
    RemoteFile,
    Retries,
    RetryPolicy,
    download,
    read_range,
)
from int8cli.errors import CorruptShardError, ModelNotFoundError, SourceError, TransferError

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.file_download import HfFileMetadata

# A safetensors header is two reads, each of which knows its length: nothing is read ahead, so that no weight travels.
# What else is read piecemeal, a `.bin`'s directory and pickle, would take a request for every few bytes.
_EXACT_SUFFIX = ".safetensors"
_READ_AHEAD_BYTES = 128 << 10
_FIRST_CONTACT_ATTEMPTS = 5  # a wrong endpoint or a missing network should be told in seconds, not minutes
_CLOSE_WAIT_S = 2.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLAIN_NAME = re.compile(r"\w[\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How to reach the Hub and where to put what it gives. None means huggingface_hub's own default.

    `download_dir` is this source's alone: files lie there while they are used, and parts until they are whole. With
    `keep_source` files go to the Hub cache instead and stay. `on_bytes(file_name, n)` hears of each piece that is
    transferred, `on_wait(what, why, pause_s)` of each pause before a retry; both may be called from another thread.
    """

    download_dir: Path
    keep_source: bool = False
    endpoint: str | None = None
    token: str | None = None
    cache_dir: Path | None = None
    timeout_s: float | None = None
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    on_bytes: Callable[[str, int], None] | None = None
    on_wait: Callable[[str, str, float], None] | None = None


@dataclass(frozen=True, slots=True)
class _Snapshot:
    commit: str
    files: tuple[str, ...]
    offline: bool


@dataclass(frozen=True, slots=True)
class _Published:
    """What the Hub says of a file: its size, and its etag, which for a file in LFS is its sha256."""

    size_bytes: int
    etag: str

    @property
    def sha256(self) -> str | None:
        return self.etag if _SHA256.fullmatch(self.etag) else None


@dataclass(slots=True)
class _Ahead:
    """A file on its way in the background."""

    file_name: str
    thread: Thread
    error: BaseException | None = None


class HubSource:
    """A repository on the Hub at one commit: whatever the revision named when it was first asked, it stays that.

    Files that are in the Hub cache at that commit are used from there and never removed. With HF_HUB_OFFLINE the
    cached snapshot is the whole source.
    """

    def __init__(self, repo_id: str, revision: str | None, options: HubOptions) -> None:
        """Asks the Hub for nothing yet."""
        self._repo_id = repo_id
        self._revision = revision
        self._options = options
        self._published: dict[str, _Published] = {}
        self._brought_to_cache: set[str] = set()
        self._ahead: _Ahead | None = None
        self._ahead_lock = Lock()
        self._stop = Event()

    def resolve(self) -> None:
        """Find the commit now rather than at first use.

        Raises ModelNotFoundError, AccessDeniedError or TransferError.
        """
        _ = self._snapshot

    @property
    def identity(self) -> SourceIdentity:
        return SourceIdentity(name=self._repo_id, revision=self._snapshot.commit, on_hub=True)

    @property
    def keeps_in(self) -> Path | None:
        from huggingface_hub import constants

        return (self._options.cache_dir or Path(constants.HF_HUB_CACHE)) if self._options.keep_source else None

    def list_files(self) -> tuple[str, ...]:
        return self._snapshot.files

    def size_bytes(self, file_name: str) -> int:
        cached = self._cached(checked_file_name(file_name))
        return cached.stat().st_size if cached is not None else self._ask(file_name).size_bytes

    def open(self, file_name: str) -> BinaryIO:
        cached = self._cached(checked_file_name(file_name))
        if cached is not None:
            return cached.open("rb")
        self._require_online(file_name)
        reader = RangeReader(self._remote(file_name), self._retries(file_name), lambda: self._ask(file_name).size_bytes)
        if file_name.endswith(_EXACT_SUFFIX):
            return cast(BinaryIO, reader)
        return BufferedReader(reader, _READ_AHEAD_BYTES)

    @contextmanager
    def fetch(self, file_name: str) -> Iterator[LocalFile]:
        self._await_ahead(checked_file_name(file_name))
        local = self._bring(file_name)
        yield local
        if local.path == self._aside(file_name):
            self._remove_aside(file_name)

    def transfers(self, file_name: str) -> bool:
        return self._cached(file_name) is None

    def prefetch(self, file_name: str) -> None:
        """At most one file is on its way at a time: while one is, a call for another does nothing."""
        checked_file_name(file_name)
        with self._ahead_lock:
            if self._stop.is_set() or (self._ahead is not None and self._ahead.thread.is_alive()):
                return
            ahead = _Ahead(file_name, Thread(target=lambda: self._bring_ahead(ahead), daemon=True))
            self._ahead = ahead
            ahead.thread.start()

    def discard(self, file_name: str) -> None:
        cached = self._cached(checked_file_name(file_name))
        if cached is None:
            self._remove_aside(file_name)
            return
        if file_name not in self._brought_to_cache:
            raise CorruptShardError(
                f"{self._label(file_name)}: the copy in the Hub cache is not what was published",
                hint=f"Delete {cached.resolve()} and run the same command again.",
            )
        cached.unlink()
        self._blob(self._ask(file_name).etag).unlink(missing_ok=True)
        self._brought_to_cache.discard(file_name)

    def close(self) -> None:
        """Stop a transfer in the background, which keeps its part; without parts the download directory goes too."""
        self._stop.set()
        with self._ahead_lock:
            ahead = self._ahead
        if ahead is not None:
            ahead.thread.join(_CLOSE_WAIT_S)  # a stalled read may last longer; the thread is a daemon and ends with us
        self._remove_empty_directories()

    # What the repository is

    @cached_property
    def _snapshot(self) -> _Snapshot:
        from huggingface_hub import constants

        _quiet_huggingface_hub()
        return self._snapshot_in_cache() if constants.HF_HUB_OFFLINE else self._snapshot_on_hub()

    def _snapshot_on_hub(self) -> _Snapshot:
        from huggingface_hub.errors import HFValidationError

        policy = self._options.retry
        attempts = min(policy.attempts, _FIRST_CONTACT_ATTEMPTS)
        first_contact = RetryPolicy(attempts, policy.first_pause_s, policy.max_pause_s)
        what = self._repo_id if self._revision is None else f"{self._repo_id} at revision {self._revision!r}"
        try:
            info = Retries(first_contact, what, self._stop, self._options.on_wait).call(self._model_info)
        except HFValidationError as error:
            raise ModelNotFoundError(f"{self._repo_id!r} is no name of a Hub repository") from error
        except (ValueError, KeyError, TypeError) as error:  # a web page, say, where JSON was to be
            raise self._no_hub() from error
        if info.sha is None or info.siblings is None or not _PLAIN_NAME.fullmatch(info.sha):
            raise self._no_hub()
        return _Snapshot(info.sha, _visible(sibling.rfilename for sibling in info.siblings), offline=False)

    def _model_info(self) -> "ModelInfo":
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._options.endpoint, token=self._options.token, library_name="int8cli")
        try:
            return api.model_info(self._repo_id, revision=self._revision, timeout=self._timeout_s)
        except KeyError:  # a server that says less of a repository than the Hub does; we need commit and files
            return self._terse_model_info()

    def _terse_model_info(self) -> "ModelInfo":
        from huggingface_hub import ModelInfo, constants, get_session, hf_raise_for_status

        url = f"{self._options.endpoint or constants.ENDPOINT}/api/models/{self._repo_id}"
        if self._revision is not None:
            url += f"/revision/{quote(self._revision, safe='')}"
        response = get_session().get(url, headers=self._headers(), timeout=self._timeout_s)
        hf_raise_for_status(response)
        return ModelInfo(**{"id": self._repo_id, **response.json()})  # type: ignore[no-untyped-call]

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, not marked so

        headers: dict[str, str] = build_hf_headers(token=self._options.token, library_name="int8cli")
        return headers

    def _no_hub(self) -> SourceError:
        return TransferError(f"{self._repo_id}: the server does not answer as a Hub does", hint="Check HF_ENDPOINT.")

    def _snapshot_in_cache(self) -> _Snapshot:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = snapshot_download(
                self._repo_id,
                revision=self._revision,
                cache_dir=self._options.cache_dir,
                local_files_only=True,
                allow_patterns=["config.json"],  # whether the weights are there, whoever asks for them will see
            )
        except (LocalEntryNotFoundError, HFValidationError) as error:
            at = f" at revision {self._revision!r}" if self._revision else ""
            raise ModelNotFoundError(
                f"{self._repo_id}{at} is not in the Hub cache, and offline mode forbids fetching it",
                hint="Unset HF_HUB_OFFLINE, or fetch the model beforehand.",
            ) from error
        root = Path(folder)
        files = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        return _Snapshot(root.name, _visible(files), offline=True)

    # One file, over the network

    @property
    def _timeout_s(self) -> float:
        from huggingface_hub import constants

        return self._options.timeout_s or constants.HF_HUB_DOWNLOAD_TIMEOUT

    def _label(self, file_name: str) -> str:
        return f"{self._repo_id}: {file_name}"

    def _retries(self, file_name: str) -> Retries:
        return Retries(self._options.retry, self._label(file_name), self._stop, self._options.on_wait)

    def _url(self, file_name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self._repo_id, file_name, revision=self._snapshot.commit, endpoint=self._options.endpoint)

    def _remote(self, file_name: str) -> RemoteFile:
        return RemoteFile(self._url(file_name), self._headers(), self._timeout_s)

    def _ask(self, file_name: str) -> _Published:
        """What the Hub says of the file; asked once."""
        if file_name not in self._published:
            self._require_online(file_name)
            retries = self._retries(file_name)
            metadata = retries.call(lambda: self._head(file_name))
            size_bytes = metadata.size
            if size_bytes is None:
                size_bytes = read_range(self._remote(file_name), 0, 1, retries).total_bytes
            if size_bytes is None:
                raise TransferError(f"{self._label(file_name)}: the server does not say how large the file is")
            self._published[file_name] = _Published(size_bytes, metadata.etag or "")
        return self._published[file_name]

    def _head(self, file_name: str) -> "HfFileMetadata":
        from huggingface_hub import get_hf_file_metadata

        return get_hf_file_metadata(
            self._url(file_name),
            token=self._options.token,
            timeout=self._timeout_s,
            library_name="int8cli",
            endpoint=self._options.endpoint,
        )

    def _require_online(self, file_name: str) -> None:
        if self._snapshot.offline:
            raise ModelNotFoundError(
                f"{self._label(file_name)} is not in the Hub cache, and offline mode forbids fetching it",
                hint="Unset HF_HUB_OFFLINE, or fetch the model beforehand.",
            )

    # One file, to this machine

    def _bring(self, file_name: str) -> LocalFile:
        cached = self._cached(file_name)
        if cached is None:
            published = self._ask(file_name)
            bring = self._bring_to_cache if self._options.keep_source else self._bring_aside
            return LocalFile(bring(file_name, published), published.sha256)
        sha256 = _blob_sha256(cached)
        if sha256 is None and not self._snapshot.offline:
            sha256 = self._ask(file_name).sha256
        return LocalFile(cached, sha256)

    def _cached(self, file_name: str) -> Path | None:
        """The file in the Hub cache at this commit, if it is there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self._repo_id, file_name, cache_dir=self._options.cache_dir, revision=self._snapshot.commit
        )
        return Path(found) if isinstance(found, str) else None

    def _aside(self, file_name: str) -> Path:
        # The commit stands in the path, so that no part of another revision is ever gone on from.
        return self._options.download_dir / self._snapshot.commit / file_name

    def _bring_aside(self, file_name: str, published: _Published) -> Path:
        path = self._aside(file_name)
        if not (path.is_file() and path.stat().st_size == published.size_bytes):  # whole from a run that was killed
            part = _part_of(path)
            self._remove_other_commits()
            self._download(file_name, part, published)
            os.replace(part, path)
        return path

    def _remove_aside(self, file_name: str) -> None:
        path = self._aside(file_name)
        path.unlink(missing_ok=True)
        _part_of(path).unlink(missing_ok=True)

    def _remove_other_commits(self) -> None:
        """Parts of another revision can never be gone on from; they would only take up the disk."""
        root = self._options.download_dir
        for directory in root.iterdir() if root.is_dir() else ():
            if _COMMIT.fullmatch(directory.name) and directory.name != self._snapshot.commit:
                shutil.rmtree(directory, ignore_errors=True)

    def _remove_empty_directories(self) -> None:
        """Only rmdir: whatever still holds a part, or anything we did not put there, stays.

        Left to `close`, since before that a download in the background may be about to write into one.
        """
        root = self._options.download_dir
        below = sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True) if root.is_dir() else []
        for directory in [*below, root]:
            with suppress(OSError):
                directory.rmdir()

    def _bring_to_cache(self, file_name: str, published: _Published) -> Path:
        """Fetch the blob to where huggingface_hub keeps it, and let huggingface_hub make the snapshot's link to it.

        The lock is the one that huggingface_hub takes itself.
        """
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # public, not marked so

        if not _PLAIN_NAME.fullmatch(published.etag):
            raise TransferError(
                f"{self._label(file_name)}: the server gives no usable ETag to cache the file under",
                hint="Do not keep the source.",
            )
        blob = self._blob(published.etag)
        repo_folder = blob.parent.parent
        lock = repo_folder.parent / ".locks" / repo_folder.name / f"{published.etag}.lock"
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(lock.parent, error) from error
        with WeakFileLock(lock):
            if not blob.exists():
                self._download(file_name, _part_of(blob), published)
                os.replace(_part_of(blob), blob)
                self._brought_to_cache.add(file_name)
        path = self._retries(file_name).call(lambda: self._link_to_blob(file_name))
        self._remember_revision(repo_folder / "refs")
        return path

    def _blob(self, etag: str) -> Path:
        """Where the cache keeps a file's bytes: https://huggingface.co/docs/huggingface_hub/guides/manage-cache."""
        from huggingface_hub import constants

        cache = Path(self._options.cache_dir or constants.HF_HUB_CACHE)
        return cache / f"models--{self._repo_id.replace('/', '--')}" / "blobs" / etag

    def _link_to_blob(self, file_name: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(
                hf_hub_download(
                    self._repo_id,
                    file_name,
                    revision=self._snapshot.commit,
                    cache_dir=self._options.cache_dir,
                    endpoint=self._options.endpoint,
                    token=self._options.token,
                    library_name="int8cli",
                )
            )
        except LocalEntryNotFoundError as error:  # wraps what went wrong on the network, which decides about a retry
            raise error.__cause__ or error from None

    def _remember_revision(self, refs: Path) -> None:
        """Note which commit the revision names, as huggingface_hub does: offline runs look a model up by it."""
        revision = self._revision or "main"
        if revision == self._snapshot.commit or not all(map(_PLAIN_NAME.fullmatch, revision.split("/"))):
            return
        ref = refs / revision
        try:
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(self._snapshot.commit)
        except OSError as error:
            raise disk_error(ref, error) from error

    def _download(self, file_name: str, part: Path, published: _Published) -> None:
        heard = self._options.on_bytes
        on_bytes = None if heard is None else lambda n: heard(file_name, n)
        download(self._remote(file_name), part, published.size_bytes, self._retries(file_name), on_bytes)

    # The next file, in the background

    def _bring_ahead(self, ahead: _Ahead) -> None:
        try:
            self._bring(ahead.file_name)
        except BaseException as error:  # raised again by the fetch that waits for this file
            ahead.error = error

    def _await_ahead(self, file_name: str) -> None:
        with self._ahead_lock:
            ahead = self._ahead
            if ahead is None or ahead.file_name != file_name:
                return
            self._ahead = None
        ahead.thread.join()
        if ahead.error is not None:
            raise ahead.error


def _visible(names: Iterator[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in names if not is_hidden(name)))


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.incomplete")


def _blob_sha256(cached: Path) -> str | None:
    """The sha256 that a cached LFS file was published with: the name of the blob which its link in a snapshot names.

    The link alone is read: a blob may itself be a link into a store that goes by other hashes.
    """
    if not cached.is_symlink():
        return None
    blob = Path(os.readlink(cached))
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None


def _quiet_huggingface_hub() -> None:
    """Its warnings would come between our own lines on stderr; a verbosity that somebody asked for stays."""
    logger = logging.getLogger("huggingface_hub")
    if logger.level == logging.WARNING:
        logger.setLevel(logging.ERROR)
