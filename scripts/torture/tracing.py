"""A process and all that it starts, watched at its system calls, with one of them struck.

Owns what a watched call is and what a blow does to it. A call is watched where it concerns a file below one of the
given directories, or a socket where those are asked for: what the interpreter itself reads is of no interest.
"""

import errno
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from torture import kernel

CHANGING = frozenset(
    {
        *(
            "open",
            "openat",
            "write",
            "pwrite64",
            "writev",
            "pwritev",
            "sendfile",
            "copy_file_range",
            "fsync",
            "fdatasync",
        ),
        *(
            "ftruncate",
            "fallocate",
            "rename",
            "renameat",
            "renameat2",
            "mkdir",
            "mkdirat",
            "rmdir",
            "unlink",
            "unlinkat",
        ),
        *("symlink", "symlinkat", "chmod"),
    }
)
FILES = frozenset(kernel.CALLS) - {"socket", "connect", "sendto", "recvfrom"}
SOCKETS = frozenset({"connect", "sendto", "recvfrom", "read", "write", "close"})
KILL, ERROR, SHORT, SIGNAL = "kill", "error", "short", "signal"

_WALL = 0x40000000
_PATH_AT: dict[
    str, tuple[str | None, str]
] = {  # where a call has its path: the register of the directory's descriptor, or None, and that of the path
    **dict.fromkeys(
        ("open", "mkdir", "rmdir", "unlink", "stat", "lstat", "readlink", "chmod", "statfs"), (None, "rdi")
    ),
    **dict.fromkeys(("openat", "mkdirat", "unlinkat", "newfstatat", "statx", "readlinkat"), ("rdi", "rsi")),
    "rename": (None, "rsi"),
    **dict.fromkeys(("renameat", "renameat2"), ("rdx", "r10")),
    "symlink": (None, "rsi"),
    "symlinkat": ("rsi", "rdx"),
}
_RENAMED_AT: dict[str, tuple[str | None, str]] = {  # and the old one, of those that have two
    "rename": (None, "rdi"),
    **dict.fromkeys(("renameat", "renameat2"), ("rdi", "rsi")),
}
RENAMED_TO = " to "  # between the two, in the record of a call
_DESCRIPTOR_IN = {"mmap": "r8", "copy_file_range": "rdx"}  # rdi for all others
_LENGTH_IN = {**dict.fromkeys(("read", "write", "pread64", "pwrite64", "recvfrom", "sendto"), "rdx"), "sendfile": "r10"}
_VECTORS_IN = frozenset({"preadv", "preadv2", "pwritev", "writev"})


@dataclass(frozen=True, slots=True)
class Blow:
    """What happens at the so many-th watched call, counted from 1.

    `kill`: the process, or with `number` 1 its whole group, is killed before the call. `error`: the call fails with
    errno `number`; close closes all the same, as Linux does. `short`: a read or write does at most `number` bytes.
    `signal`: the process gets the signal `number` and the call goes on. `times`: so many watched calls in a row.
    """

    nth: int
    kind: str
    number: int = 0
    times: int = 1


@dataclass(frozen=True, slots=True)
class Watch:
    """Which calls count: `names` below `roots` (absolute, without a slash at the end), or on sockets."""

    names: frozenset[str]
    roots: tuple[str, ...]
    sockets: bool = False
    changing: bool = False  # of opens, those alone that may make or empty a file


@dataclass(frozen=True, slots=True)
class Traced:
    """How it went. `code` as Popen's; None where it did not end in time. `calls`: name and path, as they were met.

    `after_s`: from the first blow to the end of the first process.
    """

    code: int | None
    calls: tuple[str, ...]
    struck: tuple[str, ...]
    after_s: float


class _TooLongError(Exception):
    """It did not end."""


class Tracer:
    """Follows one process, which waits for `release` in order to begin, to the end of the last that it started."""

    def __init__(self, pid: int, watch: Watch, blows: Collection[Blow], limit_s: float) -> None:
        self._pid, self._watch, self._blows, self._limit_s = pid, watch, list(blows), limit_s
        self._calls: list[str] = []
        self._struck: list[str] = []
        self._pending: dict[int, int] = {}  # by thread, the error that a call ends with
        self._code: int | None = None
        self._struck_at = self._ended_at = 0.0

    def follow(self, release: Callable[[], None]) -> Traced:
        kernel.seize(self._pid)
        release()
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, self._limit_s)
        late = False
        try:
            self._loop()
        except _TooLongError:
            late = True
            self._kill(group=True)
            self._loop()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        took_s = self._ended_at - self._struck_at if self._struck_at and self._ended_at else 0.0
        return Traced(None if late else self._code, tuple(self._calls), tuple(self._struck), took_s)

    def _loop(self) -> None:
        while True:
            try:
                thread, status = os.waitpid(-1, _WALL)
            except ChildProcessError:
                return
            if os.WIFSTOPPED(status):
                with suppress(ProcessLookupError):  # killed in the meantime
                    self._stopped(thread, os.WSTOPSIG(status), status >> 16)
            elif thread == self._pid:
                self._code, self._ended_at = os.waitstatus_to_exitcode(status), time.monotonic()

    def _stopped(self, thread: int, number: int, event: int) -> None:
        if event == kernel.EVENT_SECCOMP:
            self._at_call(thread)
        elif event == kernel.EVENT_STOP and number in (signal.SIGSTOP, signal.SIGTSTP):
            kernel.stay_stopped(thread)
        elif event:
            kernel.go_on(thread)
        elif number == signal.SIGTRAP | 0x80:
            self._after_call(thread)
        else:
            kernel.go_on(thread, number)

    def _at_call(self, thread: int) -> None:
        found = kernel.registers(thread)
        name = kernel.NAMES.get(found.orig_rax, "")
        path = self._concerned(thread, name, found)
        if path is None:
            kernel.go_on(thread)
            return
        self._calls.append(f"{name} {path}")
        nth = len(self._calls)
        blow = next((blow for blow in self._blows if blow.nth <= nth < blow.nth + blow.times), None)
        if blow is None:
            kernel.go_on(thread)
        else:
            self._strike(blow, thread, name, found)

    def _strike(self, blow: Blow, thread: int, name: str, found: kernel.Registers) -> None:
        self._struck.append(self._calls[-1])
        self._struck_at = self._struck_at or time.monotonic()
        if blow.kind == KILL:
            self._kill(group=bool(blow.number))
        elif blow.kind == SIGNAL:
            os.kill(self._pid, blow.number)
            kernel.go_on(thread)
        elif blow.kind == SHORT:
            self._shorten(blow.number, thread, name, found)
        elif name == "close":
            self._pending[thread] = blow.number
            kernel.go_to_end_of_call(thread)
        else:
            found.orig_rax, found.rax = 2**64 - 1, 2**64 - blow.number
            kernel.set_registers(thread, found)
            kernel.go_on(thread)

    def _shorten(self, most: int, thread: int, name: str, found: kernel.Registers) -> None:
        if name in _LENGTH_IN:
            register = _LENGTH_IN[name]
            setattr(found, register, min(most, getattr(found, register)))
            kernel.set_registers(thread, found)
        elif name in _VECTORS_IN and found.rdx > 0:
            with _memory(thread) as memory:
                length = int.from_bytes(os.pread(memory, 8, found.rsi + 8), "little")
                os.pwrite(memory, min(most, length).to_bytes(8, "little"), found.rsi + 8)
            found.rdx = 1
            kernel.set_registers(thread, found)
        kernel.go_on(thread)

    def _after_call(self, thread: int) -> None:
        if (number := self._pending.pop(thread, 0)) and (found := kernel.registers(thread)).rax == 0:
            found.rax = 2**64 - number
            kernel.set_registers(thread, found)
        kernel.go_on(thread)

    def _kill(self, *, group: bool) -> None:
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self._pid, signal.SIGKILL)

    def _concerned(self, thread: int, name: str, found: kernel.Registers) -> str | None:
        """What a call concerns, short, if it is watched."""
        if name not in self._watch.names:
            return None
        if self._watch.changing and name in ("open", "openat"):
            flags = found.rdx if name == "openat" else found.rsi
            if not flags & (os.O_CREAT | os.O_TRUNC):
                return None
        with suppress(OSError):
            path = _path_of(thread, name, found)
            if path.startswith("socket:"):
                return "socket" if self._watch.sockets and name in SOCKETS else None
            for root in self._watch.roots:
                if path == root or path.startswith(f"{root}/"):
                    short = path[root.rfind("/") + 1 :]
                    if name not in _RENAMED_AT:
                        return short
                    return f"{_path_at(thread, found, *_RENAMED_AT[name])[root.rfind('/') + 1 :]}{RENAMED_TO}{short}"
        return None


def _path_of(thread: int, name: str, found: kernel.Registers) -> str:
    if name not in _PATH_AT:
        return _descriptor(thread, getattr(found, _DESCRIPTOR_IN.get(name, "rdi")))
    return _path_at(thread, found, *_PATH_AT[name])


def _path_at(thread: int, found: kernel.Registers, directory: str | None, path: str) -> str:
    said = _text(thread, getattr(found, path))
    if said.startswith("/"):
        return os.path.normpath(said)
    start = _descriptor(thread, getattr(found, directory)) if directory else os.readlink(f"/proc/{thread}/cwd")
    return os.path.normpath(os.path.join(start, said))


def _descriptor(thread: int, register: int) -> str:
    number = register & 0xFFFFFFFF
    if number >= 2**31:
        if number == 2**32 - 100:  # AT_FDCWD
            return os.readlink(f"/proc/{thread}/cwd")
        raise OSError(errno.EBADF, "no descriptor")
    return os.readlink(f"/proc/{thread}/fd/{number}").removesuffix(" (deleted)")


def _text(thread: int, address: int) -> str:
    with _memory(thread) as memory:
        data = os.pread(memory, 4096 - address % 4096, address)
        if b"\0" not in data:
            data += os.pread(memory, 4096, address + len(data))
    return os.fsdecode(data.split(b"\0", 1)[0])


@contextmanager
def _memory(thread: int) -> Iterator[int]:
    """A descriptor of a stopped thread's memory."""
    descriptor = os.open(f"/proc/{thread}/mem", os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _too_long(number: int, frame: object) -> None:
    raise _TooLongError
