"""Where a checkpoint comes from: the interface that a directory and a Hub repository share.

Owns `Source`, what a source says of itself, and which file names may be asked of one. Knows no file format: a file
here is a name, a size and bytes.
"""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from int8cli.checkpoint.disk import reading_errors
from int8cli.checkpoint.file_state import FileState
from int8cli.errors import IndexFileError


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """What a model is called and which state of it this is. Holds no path of this machine.

    `name` is the Hub id, or the directory's or file's own name. `revision` is the Hub's commit hash, None locally.
    """

    name: str
    revision: str | None
    on_hub: bool


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of the source, now on this machine.

    `sha256` is what the Hub published for it, in hex, where it did. `state` is that of a file which others may write
    to, when the source first looked at it.
    """

    path: Path
    sha256: str | None = None
    state: FileState | None = None

    def require_unchanged(self, file_name: str) -> None:
        """Raise CorruptShardError, naming the file, if somebody wrote to it since the source first looked at it."""
        if self.state is not None:
            with reading_errors(self.path, file_name):
                self.state.require_same(os.stat(self.path), file_name)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard that is on this machine, for as long as whoever gave it says."""

    name: str
    local: LocalFile


class Source(Protocol):
    """A place that holds a checkpoint's files.

    File names are relative, with `/`, as the source lists them. Any name that would leave the source raises
    IndexFileError; one that is not there, ModelNotFoundError.
    """

    @property
    def identity(self) -> SourceIdentity: ...

    @property
    def keeps_in(self) -> Path | None:
        """The directory in which fetched files stay for good; None where they are there already, or do not stay."""

    def list_files(self) -> tuple[str, ...]:
        """Every file of the source but hidden ones, sorted."""

    def size_bytes(self, file_name: str) -> int:
        """The file's size, without fetching it."""

    def open(self, file_name: str) -> BinaryIO:
        """A seekable view of the file for reading a header: from the Hub, only the ranges asked for are transferred."""

    def fetch(self, file_name: str) -> AbstractContextManager[LocalFile]:
        """The whole file on this machine while the context lasts; afterwards the source may remove it again.

        A file that was brought here for this is removed when the context is left in peace, and stays for the next run
        when it is left by an error.
        """

    def transfers(self, file_name: str) -> bool:
        """Whether `fetch` would have to bring the file here from elsewhere."""

    def prefetch(self, file_name: str) -> None:
        """Start to bring a file here, so that a later `fetch` of it need not wait. Returns at once."""

    def discard(self, file_name: str) -> None:
        """Give up a copy that is not what was published, so that the next `fetch` transfers the file anew.

        Raises CorruptShardError, saying what to delete, for a copy that is not this source's to remove.
        """

    def close(self) -> None:
        """Stop what is under way and leave nothing behind but what a later run can go on from."""


def checked_file_name(file_name: str) -> str:
    """The name itself, if it stays inside the source. Raises IndexFileError: no index is to be trusted with paths."""
    parts = file_name.split("/")
    leaves = PurePosixPath(file_name).is_absolute() or ".." in parts or "\\" in file_name or "\0" in file_name
    if leaves or not all(parts):
        raise IndexFileError(
            f"{file_name!r} is not a valid file name in a checkpoint",
            hint="File names must be relative, with / between directories, and without `..`.",
        )
    return file_name


def is_hidden(file_name: str) -> bool:
    """Whether the file, or a directory on the way to it, starts with a dot."""
    return any(part.startswith(".") for part in file_name.split("/"))
