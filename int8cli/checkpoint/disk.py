"""What a disk that takes no more, or gives nothing back, looks like to the user.

Owns the translation of the file system's errors into ours.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from int8cli.errors import DiskSpaceError, NotEnoughMemoryError, OutputError, SourceError, SystemRefusalError

# For a file of a checkpoint that contradicts itself, wherever it came from.
GET_IT_AGAIN = "The file is cut short or damaged: get it again, then run the same command again."


@contextmanager
def disk_errors(path: Path, wanted_bytes: int = 0) -> Iterator[None]:
    """Raise DiskSpaceError or OutputError for an OSError. Put it around what writes `path`, and around nothing else."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error, wanted_bytes) from error


@contextmanager
def reading_errors(path: Path, name: str | None = None) -> Iterator[None]:
    """Raise SourceError for an OSError. Put it around what reads the source's `path`, called `name` in messages."""
    try:
        yield
    except OSError as error:
        raise reading_error(path, error, name) from error


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise children of Int8cliError for what the system refuses and nobody nearer to it has translated.

    Around all that a caller of the library can call; a broken pipe is the caller's own.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise system_refusal(error) from error
    except MemoryError as error:
        raise NotEnoughMemoryError(
            "this process is not given as much memory as it needs",
            hint="Close other programs, or raise the limit that it runs under, and run the same command again.",
        ) from error
    except ImportError as error:
        library = _unloadable(error)
        if library is None:
            raise
        raise SystemRefusalError(
            f"{library} cannot be loaded ({error!s:.200})",
            hint="Raise the limits that this process runs under, or install the package again.",
        ) from error


def _unloadable(error: BaseException | None) -> str | None:
    """The shared library that the system did not load, where that is why an import failed."""
    while error is not None:
        path = error.path if isinstance(error, ImportError) else None
        if path is not None and not path.endswith(".py"):
            return path
        error = error.__cause__ or error.__context__
    return None


def system_refusal(error: OSError) -> SystemRefusalError:
    """What to say of an error that came from anywhere."""
    where = f"{error.filename}: " if error.filename is not None else ""
    hint = "Check the file, the disk and the limits that this process runs under, and run the same command again."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "Raise the limit of open files (ulimit -n), and run the same command again."
    return SystemRefusalError(f"{where}{error.strerror or error}", hint=hint)


def reading_error(path: Path, error: OSError, name: str | None = None) -> SourceError:
    """What to say when the system does not give a source file's bytes, or does not say what is in a directory."""
    return SourceError(
        f"{name or path.name or path} cannot be read: {error.strerror or error}",
        hint=f"Check {path}: its permissions, and its disk.",
    )


def disk_error(path: Path, error: OSError, wanted_bytes: int = 0) -> OutputError:
    """What to say when `path` could not be written, or could not grow by `wanted_bytes`, where that is known."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        wanted = f" for {wanted_bytes:,} bytes more" if wanted_bytes else ""
        return DiskSpaceError(
            f"{path}: not enough disk space{wanted} ({error.strerror})",
            hint="Free some space and run the same command again: finished shards are not converted again.",
        )
    return OutputError(
        f"{path}: cannot be written ({error.strerror or error})", hint="Choose a directory that you can write to."
    )
