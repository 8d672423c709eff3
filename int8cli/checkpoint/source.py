"""Where a checkpoint comes from: the interface that a directory and a Hub repository share.

Owns `Source`, its identity, and which file names are valid. Knows no file format: a file here is a name, a size and
bytes.
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
    """A model's name and revision. Contains no path of this machine.

    `name` is the Hub id, or the directory's or file's own name. `revision` is the Hub's commit hash; None locally.
    """

    name: str
    revision: str | None
    on_hub: bool


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of the source that is on this machine.

    `sha256` is the digest that the Hub published for it, in hex; None if there is none. `state` is the file's state at
    its first use; None for a download of ours, which nobody else writes to.
    """

    path: Path
    sha256: str | None = None
    state: FileState | None = None

    def require_unchanged(self, file_name: str) -> None:
        """Raise CorruptShardError, naming the file, if it was written to since its first use."""
        if self.state is not None:
            with reading_errors(self.path, file_name):
                self.state.require_same(os.stat(self.path), file_name)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard that is on this machine until its giver removes it."""

    name: str
    local: LocalFile


class Source(Protocol):
    """The files of a checkpoint.

    File names are relative, with `/`, as the source lists them. A name that would lead out of the source raises
    IndexFileError; a missing file raises ModelNotFoundError.
    """

    @property
    def identity(self) -> SourceIdentity: ...

    @property
    def keeps_in(self) -> Path | None:
        """The directory that permanently keeps fetched files; None if files are local, or removed after use."""

    def list_files(self) -> tuple[str, ...]:
        """Every file of the source except hidden ones, sorted."""

    def size_bytes(self, file_name: str) -> int:
        """The file's size, without fetching it."""

    def open(self, file_name: str) -> BinaryIO:
        """A seekable view of the file, for reading a header. From the Hub, only the ranges that are read travel."""

    def fetch(self, file_name: str) -> AbstractContextManager[LocalFile]:
        """The whole file on this machine, while the context lasts.

        A file that was downloaded for this is removed when the context ends normally. If it ends with an error, the
        file stays for the next run.
        """

    def transfers(self, file_name: str) -> bool:
        """Whether `fetch` would have to download the file."""

    def downloads(self, file_name: str) -> tuple[Path, ...]:
        """Where `fetch` would download the file to, which it resumes there: unfinished, and complete.

        Empty if it downloads nothing.
        """

    def prefetch(self, file_name: str) -> None:
        """Start to download a file in the background, so that a later `fetch` need not wait. Returns at once."""

    def discard(self, file_name: str) -> None:
        """Remove a copy that differs from the published file, so that the next `fetch` downloads it again.

        Raises CorruptShardError, saying what to replace or delete, if the copy does not belong to this source.
        """

    def close(self) -> None:
        """Stop running transfers, and remove everything except partial downloads that a later run can resume."""


def checked_file_name(file_name: str) -> str:
    """The name itself, if it stays inside the source. Raises IndexFileError: paths from an index are not trusted."""
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
