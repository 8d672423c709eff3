"""A file as it is to be in a repository on the Hub, and the operation of a commit that adds it.

Owns what this program sets on huggingface_hub's operations.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from int8cli.checkpoint.digest import sha256_of
from int8cli.checkpoint.directory import is_weight_name
from int8cli.checkpoint.disk import reading_errors
from int8cli.checkpoint.file_state import FileState
from int8cli.checkpoint.hub.lfs import LfsObject
from int8cli.checkpoint.output_names import CONVERSION_FILE
from int8cli.checkpoint.source import LocalFile
from int8cli.errors import CorruptShardError, DestinationError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_NAMED = 3  # files in a message
_SAMPLE_BYTES = 512  # what the Hub asks for, to tell text from bytes


@dataclass(frozen=True, slots=True)
class PushFile:
    """A file as it is to be in the repository. `path` is None if its bytes were uploaded before and are not here.

    `mark` is what an object store said of it after the upload; empty on the Hub. `state` is that of the file at `path`
    when its digest was computed.
    """

    name: str
    size_bytes: int
    sha256: str
    git_sha1: str | None = None
    path: Path | None = None
    mark: str = ""
    state: FileState | None = None

    def require_unchanged(self) -> None:
        """Raise CorruptShardError if the file that is here has other bytes than those of its digest.

        It is read only if it was written to: another process that has the same shard may have written the same bytes.
        """
        if self.path is None:
            return
        try:
            LocalFile(self.path, state=self.state).require_unchanged(self.name)
        except CorruptShardError:
            if sha256_of(self.path) != self.sha256:
                raise

    @property
    def lfs(self) -> LfsObject:
        return LfsObject(self.sha256, self.size_bytes)


@dataclass(frozen=True, slots=True)
class Uploaded:
    """Whether a file's bytes were sent, or were there, or are wanted in the commit itself, as with text."""

    how: Literal["sent", "had", "for the commit"]
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit, by its hash. `made`: this program made it just now; otherwise all files were there already."""

    oid: str
    made: bool


def refuse_foreign_weights(label: str, there: Iterable[str], ours: Iterable[str]) -> None:
    """Raise DestinationError if there are weights that are not among the files `ours`, or that no conversion pushed.

    A source has shards of the same names as its conversion: they are foreign where no conversion has put its
    description beside them.
    """
    found = set(there)
    replaceable = set(ours) if CONVERSION_FILE in found else set()
    foreign = sorted(name for name in found - replaceable if is_weight_name(name))
    if foreign:
        raise DestinationError(
            f"{label} holds another model: {named(foreign)}",
            hint="Choose another place, or delete these files there: loaders would find both.",
        )


def named(names: Sequence[str]) -> str:
    """Some names for a message, and how many more there are."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def addition_of(file: PushFile) -> "CommitOperationAdd":
    """The operation that adds a file to a commit.

    For a file that is not here it is in the state in which `preupload_lfs_files` leaves one that it has uploaded.
    huggingface_hub has no public way to make it in a later process; tests hold both ends of its versions to it.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(file.name, b"")
    sample = b""
    if file.path is not None:
        with reading_errors(file.path, file.name), file.path.open("rb") as opened:
            sample = opened.read(_SAMPLE_BYTES)
        operation.path_or_fileobj = str(file.path)
    operation.upload_info = UploadInfo(size=file.size_bytes, sample=sample, sha256=bytes.fromhex(file.sha256))
    if file.path is None:
        operation._upload_mode = "lfs"
        operation._should_ignore = False
        operation._is_uploaded = True
    return operation


def is_there(file: PushFile, there: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a repository has exactly this file. `there` has the digests of its files by name."""
    return not {file.sha256, file.git_sha1}.isdisjoint(there.get(file.name, ()))


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep huggingface_hub from drawing progress bars between our lines, unless the environment asks for them."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, not marked so
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
