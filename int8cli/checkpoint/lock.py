"""Locks that allow only one run at a time on a directory, or several that share it.

They are the kernel's locks: a lock is released when the last process that holds it ends in any way, so a killed run
never blocks a later one. Some file systems of a network know only the locks of one machine, and some have none: what
several machines share must not rely on locks.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import getnode

from int8cli.checkpoint.disk import disk_error, disk_errors
from int8cli.checkpoint.own_files import open_real_directory
from int8cli.errors import CannotLockError, OutputInUseError

_IN_USE_HINT = "Wait for it to end, or choose another directory."
_A_LOOK_S = 0.05  # how long `refuse_while_locked` holds a lock, at most


def lock_or_close(descriptor: int, in_use: str, hint: str, kind: int = fcntl.LOCK_EX) -> None:
    """Lock an open file or directory; close it if that fails.

    Raises OutputInUseError with the message `in_use` if another process has the lock, CannotLockError if the disk does
    not support locks.
    """
    try:
        _flock(descriptor, kind, in_use, hint)
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
        raise CannotLockError(
            f"the disk cannot lock the directory ({error.strerror}), so a second run on it could not be prevented",
            hint="Choose a directory on a local disk.",
        ) from error


def refuse_while_locked(path: Path, in_use: str, hint: str) -> None:
    """Raise OutputInUseError with the message `in_use` if a process has the lock. Does not lock anything itself.

    On a disk without locks nobody has it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block for ever
    except FileNotFoundError:
        return
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        with suppress(CannotLockError):
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
    """Lock an output directory for one run, by a lock on `own`, a directory in it.

    Yields the lock's descriptor. Workers with a duplicate of it keep the lock. At the end, `own` is removed if it is
    empty. Raises OutputInUseError, OutputError.
    """
    descriptor = _lock(output, own, fcntl.LOCK_EX)
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            own.rmdir()
        os.close(descriptor)


@contextmanager
def shared(output: Path, own: Path) -> Iterator[int]:
    """Lock an output directory for one of several runs that may be on it at once, and exclude `locked`.

    On a disk without locks nothing is locked. Otherwise as `locked`.
    """
    try:
        descriptor = _lock(output, own, fcntl.LOCK_SH)
    except CannotLockError:
        descriptor = _open_own(output, own)
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            own.rmdir()
        os.close(descriptor)


def hold(descriptor: int) -> None:
    """Lock a new file of this process for as long as it is open; does nothing on a disk without locks."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(path: Path) -> bool:
    """Whether a process on this machine holds a file by `hold`. A file that cannot be locked counts as held.

    False for a file that does not exist.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return os.path.lexists(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def lock_domain() -> str:
    """The running kernel, by a random id: within it, locks work on every disk that has any."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{getnode():012x}"  # the network address: macOS


def _lock(output: Path, own: Path, kind: int) -> int:
    return lock_by_name(own, lambda: _open_own(output, own), _in_use(output), _IN_USE_HINT, kind)


def _open_own(output: Path, own: Path) -> int:
    with disk_errors(output):
        own.mkdir(parents=True, exist_ok=True)
        return open_real_directory(own)


def lock_by_name(path: Path, open_it: Callable[[], int], in_use: str, hint: str, kind: int = fcntl.LOCK_EX) -> int:
    """Open and lock a file or directory that its last holder may have removed. Returns its descriptor.

    A file that has lost its name does not lock out the next process, which would create and lock another. Raises as
    `lock_or_close`.
    """
    while True:
        descriptor = open_it()
        lock_or_close(descriptor, in_use, hint, kind)
        is_current = False
        try:
            with disk_errors(path):
                is_current = _is_current(path, descriptor)
        finally:
            if not is_current:  # the previous run removed it after it was opened here, or that could not be checked
                os.close(descriptor)
        if is_current:
            return descriptor


def _is_current(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to the directory of an open descriptor."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
