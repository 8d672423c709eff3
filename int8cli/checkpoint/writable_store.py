"""An object store that the files of a conversion are written to: shards first, what loaders open last.

Owns that order, and how an object is known to be the one that was written.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from int8cli.checkpoint.config_file import CONFIG_FILE
from int8cli.checkpoint.hub.push_file import Commit, PushFile, Uploaded, refuse_foreign_weights
from int8cli.checkpoint.hub.retries import RetryPolicy
from int8cli.checkpoint.object_store import ObjectStore
from int8cli.errors import DestinationError, ModelNotFoundError

_TRY_AGAIN = "Run the same command again: it resumes where this run stopped."


class WritableStore:
    """The objects below an address. Raises what `ObjectStore` raises."""

    def __init__(self, url: str, retry: RetryPolicy, on_wait: Callable[[str, str, float], None] | None = None) -> None:
        self._store = ObjectStore(url, retry, on_wait)

    @property
    def name(self) -> str:
        return self._store.url

    @property
    def revision(self) -> str:
        """A store has no branches."""
        return ""

    @property
    def label(self) -> str:
        return self._store.url

    @property
    def directory(self) -> Path | None:
        return self._store.directory

    def prepare(self, ours: Sequence[str]) -> None:
        """Raises DestinationError if there are weights that are not among the files `ours`."""
        refuse_foreign_weights(self.label, self._store.files(), ours)

    def claim(self, conversion: PushFile) -> None:
        """Remove the config.json of another model that is there: no loader opens it while it is replaced."""
        if self._holds(conversion):
            return
        with suppress(ModelNotFoundError):  # an account that may not remove can write to an empty place
            self._store.ask(CONFIG_FILE, self._store.path_of(CONFIG_FILE))
            self._store.remove(CONFIG_FILE)
        self.upload(conversion)

    def missing(self, files: Sequence[PushFile]) -> set[str]:
        """The names of files that are not there as they were written, by size and by what the store says of them."""
        return {file.name for file in files if not self._is_there(file)}

    def upload(self, file: PushFile) -> Uploaded:
        """Write a file that is here. It is visible at once; loaders find it by the files that `commit` writes."""
        assert file.path is not None
        written = self._store.write(file.path, file.name)
        if written.size_bytes != file.size_bytes:
            raise DestinationError(
                f"{self.label}: {file.name} has {written.size_bytes:,} bytes; {file.size_bytes:,} were written",
                hint=_TRY_AGAIN,
            )
        file.require_unchanged()  # stores publish no sha256 to compare with
        return Uploaded("sent", written.mark)

    def commit(self, files: Sequence[PushFile], message: str) -> Commit:
        """Write the files that are here, config.json last: no loader opens a directory that is not complete.

        Stores have no commits: the hash is one of all names and digests, and `message` is not used. Raises
        DestinationError if files that were uploaded before have changed or are gone.
        """
        lost = self.missing([file for file in files if file.path is None])
        if lost:
            raise DestinationError(f"{self.label} does not have {min(lost)} as it was written", hint=_TRY_AGAIN)
        for file in sorted(files, key=lambda file: (file.name == CONFIG_FILE, file.name)):
            if file.path is not None:
                self.upload(file)
        listing = "\n".join(sorted(f"{file.sha256} {file.name}" for file in files))
        return Commit(sha256(listing.encode()).hexdigest(), made=True)

    def close(self) -> None:
        self._store.close()

    def _holds(self, file: PushFile) -> bool:
        """Whether the store has the bytes of a small file."""
        path = self._store.path_of(file.name)
        try:
            found = self._store.ask(file.name, path)
            if found.size_bytes != file.size_bytes:
                return False
            data = self._store.call(lambda: self._store.read(path, 0, found.size_bytes), f"{self.label}: {file.name}")
        except ModelNotFoundError:
            return False
        return sha256(data).hexdigest() == file.sha256

    def _is_there(self, file: PushFile) -> bool:
        try:
            found = self._store.ask(file.name, self._store.path_of(file.name))
        except ModelNotFoundError:
            return False
        return (found.size_bytes, found.mark) == (file.size_bytes, file.mark)
