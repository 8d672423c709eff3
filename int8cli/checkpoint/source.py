"""Where a checkpoint comes from: the interface that a directory and a Hub repository share.

Owns `Source` and what a source says of itself. Knows no file format: a file here is a name, a size and bytes.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol


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
    """A file of the source, now on this machine. `sha256` is what the Hub published for it, in hex, where it did."""

    path: Path
    sha256: str | None = None


class Source(Protocol):
    """A place that holds a checkpoint's files. File names are relative, with `/`, as the source lists them."""

    @property
    def identity(self) -> SourceIdentity: ...

    def list_files(self) -> tuple[str, ...]:
        """Every file of the source, sorted."""

    def size_bytes(self, file_name: str) -> int:
        """The file's size, without fetching it."""

    def open(self, file_name: str) -> BinaryIO:
        """A seekable view of the file for reading a header: from the Hub, only the ranges asked for are transferred."""

    def fetch(self, file_name: str) -> AbstractContextManager[LocalFile]:
        """The whole file on this machine while the context lasts; afterwards the source may remove it again."""

    def prefetch(self, file_name: str) -> None:
        """Start to bring a file here, so that a later `fetch` of it need not wait. Returns at once."""

    def close(self) -> None:
        """Stop what is under way and leave nothing behind but what a later run can go on from."""
