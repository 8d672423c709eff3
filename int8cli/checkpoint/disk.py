"""Errors of the operating system, translated into ours. Owns their messages."""

import errno
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from int8cli.errors import (
    DiskSpaceError,
    MemoryRefusedError,
    OutputError,
    PlaceError,
    SourceError,
    SystemRefusalError,
)

# For a file of a checkpoint that contradicts itself, wherever it came from.
GET_IT_AGAIN = "The file is cut short or damaged: get it again, then run the same command again."
_HUB_SETTINGS_FILE = "huggingface_hub/constants.py"
_NOT_MAPPED = "failed to map segment from shared object"  # the system's loader, without a number
_NO_MEMORY_IN_TORCH = "DefaultCPUAllocator: can't allocate memory"
# What the disk or the system refuses. Others tell of names, or of a network that a library has tried.
_REFUSED = frozenset(
    {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.EACCES, errno.EPERM}
    | {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO}
)
_MORE_MEMORY = "Close other programs, or raise the limits of this process, and run the same command again."


@contextmanager
def disk_errors(path: Path, wanted_bytes: int = 0) -> Iterator[None]:
    """Raise DiskSpaceError or OutputError for an OSError. Use it only around code that writes `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error, wanted_bytes) from error


@contextmanager
def reading_errors(path: Path, name: str | None = None) -> Iterator[None]:
    """Raise SourceError for an OSError. Use it only around code that reads `path`, called `name` in messages."""
    try:
        yield
    except OSError as error:
        raise reading_error(path, error, name) from error


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise children of Int8cliError for the system errors that no inner code has translated.

    Used around the library's public functions. A broken pipe is left to the caller.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise system_refusal(error) from error
    except MemoryError as error:
        raise _no_memory() from error
    except (ImportError, ValueError, RuntimeError) as error:
        refusal = _refused_memory(error) or _refused_thread(error) or _refused_import(error)
        if refusal is None:
            raise
        raise refusal from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise SystemRefusalError(
            f"a library failed: {error!s:.200}", hint="Raise the limits of this process, or install the library again."
        ) from error


def is_panic(error: BaseException) -> bool:
    """Whether a library that is written in Rust gave up. Its error is no Exception, and its class has no module.

    https://docs.rs/pyo3/latest/pyo3/panic/struct.PanicException.html
    """
    return type(error).__name__ == "PanicException" and not isinstance(error, Exception)


def raise_if_of_the_system(error: BaseException) -> None:
    """Raise a child of Int8cliError if the system refused memory, a thread or a call; do nothing for other errors.

    Then an error that a library raised says nothing about the model that it was given. Libraries wrap such errors in
    their own, so the causes count too. A file or server that is missing is for the caller to judge.
    """
    cause: BaseException | None = error
    while cause is not None:
        refusal = _refused_memory(cause) or _refused_thread(cause)
        if isinstance(cause, MemoryError):
            refusal = _no_memory()
        elif isinstance(cause, OSError) and cause.errno in _REFUSED:
            refusal = system_refusal(cause)
        elif isinstance(cause, (ImportError, OSError)) and _NOT_MAPPED in str(cause):
            refusal = SystemRefusalError(f"a library cannot be loaded: {cause!s:.200}", hint=_MORE_MEMORY)
        elif isinstance(cause, SystemError):  # of Python's own C code, and of extensions that got no memory
            refusal = SystemRefusalError(f"Python failed inside: {cause!s:.200}", hint=_MORE_MEMORY)
        if refusal is not None:
            raise refusal from error
        cause = cause.__cause__ or cause.__context__


def _no_memory() -> MemoryRefusedError:
    return MemoryRefusedError("the system does not give this process the memory that it needs", hint=_MORE_MEMORY)


def _refused_memory(error: BaseException) -> MemoryRefusedError | None:
    """The error to show if torch got no memory for a tensor on the CPU, for which it has a RuntimeError without a type.

    https://github.com/pytorch/pytorch/blob/v2.13.0/c10/core/impl/alloc_cpu.cpp
    """
    return _no_memory() if isinstance(error, RuntimeError) and _NO_MEMORY_IN_TORCH in str(error) else None


def _refused_thread(error: BaseException) -> SystemRefusalError | None:
    """The error to show if the system refused a thread, for which Python has a RuntimeError; None for any other."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not isinstance(error, RuntimeError) or threading.Thread.start.__code__ not in codes:
        return None
    return SystemRefusalError(
        "the system does not give this process another thread",
        hint="Close other programs, or raise the limits on threads and memory (ulimit -u, ulimit -v).",
    )


def _refused_import(error: BaseException) -> SystemRefusalError | None:
    """The error to show if a library cannot be imported here; None for any other error."""
    refused = refused_setting(error)
    if refused is not None:
        return SystemRefusalError(
            f"huggingface_hub refuses a setting in the environment: {refused!s:.200}",
            hint="Check HF_ENDPOINT and the other variables whose names begin with HF_.",
        )
    library = _unloadable(error)
    if library is None or not isinstance(error, ImportError):
        return None
    return SystemRefusalError(
        f"{library} cannot be loaded ({error!s:.200})",
        hint="Raise the limits of this process, or install the package again.",
    )


def refused_setting(error: BaseException | None) -> ValueError | None:
    """What huggingface_hub raised when it read its settings, which it does while it is imported; None if it did not.

    Such an error can arrive inside that of another library, which imports huggingface_hub too.
    """
    while error is not None:
        files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
        if isinstance(error, ValueError) and any(file.endswith(_HUB_SETTINGS_FILE) for file in files):
            return error
        error = error.__cause__ or error.__context__
    return None


def _unloadable(error: BaseException | None) -> str | None:
    """The shared library that the system did not load; None if an import failed for another reason."""
    while error is not None:
        path = error.path if isinstance(error, ImportError) else None
        if path is not None and not path.endswith(".py"):
            return path
        error = error.__cause__ or error.__context__
    return None


def system_refusal(error: OSError) -> SystemRefusalError:
    """The error to show for an OSError of unknown origin."""
    where = f"{error.filename}: " if error.filename is not None else ""
    hint = "Check the file, the disk and the limits of this process, and run the same command again."
    return SystemRefusalError(f"{where}{error.strerror or error}", hint=_limit_hint(error) or hint)


def _limit_hint(error: OSError) -> str:
    """What helps where it is not the file or the disk that is at fault; empty otherwise."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "Raise the limit on open files (ulimit -n), and run the same command again."
    return _MORE_MEMORY if error.errno == errno.ENOMEM else ""


def reading_error(path: Path, error: OSError, name: str | None = None) -> SourceError:
    """The error to show if a file of the source cannot be read, or a directory cannot be listed."""
    return SourceError(
        f"{name or path.name or path} cannot be read: {error.strerror or error}",
        hint=_limit_hint(error) or f"Check {path}: its permissions, and its disk.",
    )


def disk_error(path: Path, error: OSError, wanted_bytes: int = 0) -> OutputError:
    """The error to show if `path` cannot be written, or cannot grow by `wanted_bytes` (0 if unknown)."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        wanted = f" for {wanted_bytes:,} more bytes" if wanted_bytes else ""
        return DiskSpaceError(
            f"{path}: not enough disk space{wanted} ({error.strerror})",
            hint="Free some space and run the same command again. It does not repeat finished shards.",
        )
    message, limit = f"{path}: cannot be written ({error.strerror or error})", _limit_hint(error)
    if limit:
        return OutputError(message, hint=limit)
    return PlaceError(message, hint="Choose a directory that you can write to.")
