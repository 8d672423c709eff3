"""One run at a time on a directory.

Owns the locks that keep two runs apart. They are the kernel's: a lock ends with the last process that holds it, however
that ends, and what is left of a killed run never locks anybody out.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from int8cli.checkpoint.disk import disk_error, disk_errors
from int8cli.checkpoint.own_files import open_real_directory
from int8cli.errors import OutputError, OutputInUseError

_IN_USE_HINT = "Wait for it to end, or choose another directory."
_A_LOOK_S = 0.05  # how long `refuse_while_locked` holds a lock, at most


def hold(descriptor: int, in_use: str, hint: str) -> None:
    """Lock an open file or directory. Closed where that fails.

    Raises OutputInUseError, saying `in_use`, where another holds it; OutputError where its disk gives no locks.
    """
    try:
        _flock(descriptor, fcntl.LOCK_EX, in_use, hint)
    except BaseException:
        os.close(descriptor)
        raise


def _flock(descriptor: int, kind: int, in_use: str, hint: str) -> None:
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:  # perhaps of one that only looks, and is gone at once
            time.sleep(_A_LOOK_S)
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputInUseError(in_use, hint=hint) from error
    except OSError as error:
        raise OutputError(
            f"the disk does not lock the directory ({error.strerror}), so two runs on it could not be kept apart",
            hint="Choose a directory on a disk of this machine.",
        ) from error


def refuse_while_locked(path: Path, in_use: str, hint: str) -> None:
    """Raise OutputInUseError, saying `in_use`, if a process holds the lock on a file or directory; take none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        _flock(descriptor, fcntl.LOCK_SH, in_use, hint)
    finally:
        os.close(descriptor)


def refuse_if_in_use(output: Path, own: Path) -> None:
    """Raise OutputInUseError if another process holds an output directory; take no lock. See `locked`."""
    refuse_while_locked(own, _in_use(output), _IN_USE_HINT)


def _in_use(output: Path) -> str:
    return f"{output} is in use by another int8cli process"


@contextmanager
def locked(output: Path, own: Path) -> Iterator[int]:
    """Hold an output directory for one run, by a lock on `own`, a directory in it, which leaves no file.

    Yields the descriptor whose duplicates, in workers, keep the lock. An `own` that is empty at the end is removed.
    Raises OutputInUseError, OutputError.
    """
    descriptor = _lock(output, own)
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            own.rmdir()
        os.close(descriptor)


def _lock(output: Path, own: Path) -> int:
    while True:
        with disk_errors(output):
            own.mkdir(parents=True, exist_ok=True)
            descriptor = open_real_directory(own)
        hold(descriptor, _in_use(output), _IN_USE_HINT)
        still = False
        try:
            with disk_errors(own):
                still = _is_still(own, descriptor)
        finally:
            if not still:  # its last holder removed it in between, or nobody knows
                os.close(descriptor)
        if still:
            return descriptor


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
