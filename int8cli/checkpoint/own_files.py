"""Files that this program creates and removes below a directory which the user chose.

Owns how they are opened: through descriptors of their directories and without following links, so that a planted link
cannot lead outside. Knows no file by name.
"""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from int8cli.errors import OutputError, PlaceError

_LONGEST_NAME_BYTES = 255
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class OwnPath:
    """A file or directory of ours, and the directory above it that the user chose: below that, no link is followed.

    `aside` is the directory where files are written until they are complete; None: that of the file itself.
    """

    path: Path
    below: Path
    aside: Path | None = None

    def __truediv__(self, name: str) -> "OwnPath":
        return OwnPath(self.path / name, self.below, self.aside)


def name_aside(name: str, *, prefix: str = "", suffix: str = "") -> str:
    """The name of a file until it is complete. A digest replaces a name that would become too long."""
    aside = f"{prefix}{name}{suffix}"
    if len(os.fsencode(aside)) <= _LONGEST_NAME_BYTES:
        return aside
    return f"{prefix}{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}{suffix}"


@contextmanager
def opened_directory(directory: Path, below: Path, *, make: bool = False) -> Iterator[int]:
    """A descriptor of `directory`, which is `below` or is below it. Links are followed up to `below`, not after it.

    `make`: create missing directories. Raises OSError, and OutputError for a link after `below`.
    """
    if make:
        below.mkdir(parents=True, exist_ok=True)
    descriptor, reached = os.open(below, _DIRECTORY), below
    try:
        for name in _parts_below(directory, below):
            reached /= name
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=descriptor)
            above, descriptor = descriptor, _open_real(name, descriptor, reached)
            os.close(above)
        yield descriptor
    finally:
        os.close(descriptor)


def open_real_directory(path: Path) -> int:
    """A descriptor of a directory. Raises OSError, and OutputError if it is a link."""
    return _open_real(str(path), None, path)


def create_file(name: str, directory: int) -> int:
    """A descriptor of a new file in an open directory, for reading and writing. Raises OSError.

    A file or link that has the name, such as one that a killed run left, is removed first.
    """
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=directory)


def open_or_create(name: str, directory: int) -> int:
    """A descriptor that appends to a file of ours in an open directory. Raises OSError.

    A link, or a file with a second name (a hard link), is not ours: it is replaced by a new file.
    """
    with suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            os.unlink(name, dir_fd=directory)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o666, dir_fd=directory)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data` to an open file. A disk that is nearly full takes a part of it first. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_files(directory: Path, below: Path) -> None:
    """Write the files in a directory of ours, and their names, to the disk. Raises OSError, OutputError."""
    with opened_directory(directory, below) as itself:
        for name in os.listdir(itself):
            sync_file(name, itself)
        os.fsync(itself)


def sync_file(name: str | Path, directory: int | None = None) -> None:
    """Write a file of ours to the disk. `name` is relative to an open directory, if there is one. Raises OSError."""
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove_tree(directory: Path, below: Path) -> None:
    """Remove a directory of ours. Errors are ignored. Links and what is no directory are neither followed nor removed.

    Raises OutputError if the directory is not below `below`.
    """
    _parts_below(directory, below)
    with suppress(OSError, OutputError), opened_directory(directory.parent, below) as parent:
        os.close(_open_real(directory.name, parent, directory))  # rmtree itself would wait for a pipe's other end
        shutil.rmtree(directory.name, ignore_errors=True, dir_fd=parent)


def remove_file(path: Path, below: Path) -> None:
    """Remove a file of ours, or a link in its place, if there is one. Raises OSError, OutputError."""
    with suppress(FileNotFoundError), opened_directory(path.parent, below) as directory:
        os.unlink(path.name, dir_fd=directory)


def remove_files_but(kept: Collection[Path], directory: Path, below: Path) -> None:
    """Remove what is in a directory of ours and below it, except for these files and the directories above them.

    Raises OSError, OutputError.
    """
    for path, _, names in os.walk(directory):
        for name in names:
            if (found := Path(path, name)) not in kept:
                remove_file(found, below)
    remove_empty_directories(directory, below)


def remove_empty_directories(directory: Path, below: Path) -> None:
    """Remove a directory of ours and those in it, as far as they hold no file. No link is followed.

    Raises OutputError if it is not below `below`.
    """
    _parts_below(directory, below)
    with suppress(OSError, OutputError), opened_directory(directory.parent, below) as parent:
        with opened_directory(directory, below) as itself:
            for _, names, _, above in os.fwalk(topdown=False, dir_fd=itself):
                for name in names:
                    with suppress(OSError):  # it holds something, or is a link
                        os.rmdir(name, dir_fd=above)
        os.rmdir(directory.name, dir_fd=parent)


def refuse_link(path: Path) -> None:
    """Raise OutputError if a path is a link. It is that of one of our directories, which may not exist."""
    if os.path.islink(path):
        raise _is_a_link(path)


def _parts_below(directory: Path, below: Path) -> tuple[str, ...]:
    parts = directory.relative_to(below).parts
    if os.pardir in parts:
        raise OutputError(f"{directory} is not inside {below}")
    return parts


def _open_real(name: str, parent: int | None, path: Path) -> int:
    try:
        return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(name, parent):
            raise _is_a_link(path) from error
        raise


def _is_link(name: str, parent: int | None) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def _is_a_link(path: Path) -> PlaceError:
    return PlaceError(
        f"{path} is a link, and its target does not belong to int8cli",
        hint="Remove the link, or choose another output directory.",
    )
