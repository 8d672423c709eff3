"""The kernel's side of tracing a process: system calls that stop it, and its registers while it is stopped.

Owns ptrace(2) and seccomp(2), through ctypes, for Linux on x86-64. Knows nothing of what is done at a stop.
"""

import ctypes
import os
import platform
import signal
import struct
import sys

CALLS = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "ioctl": 16, "pread64": 17, "pwrite64": 18,
    "writev": 20, "sendfile": 40, "socket": 41, "connect": 42, "sendto": 44, "recvfrom": 45, "flock": 73,
    "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getdents64": 217, "rename": 82, "mkdir": 83, "rmdir": 84,
    "unlink": 87, "symlink": 88, "readlink": 89, "stat": 4, "open": 2, "lstat": 6, "chmod": 90, "statfs": 137,
    "fstatfs": 138, "fadvise64": 221, "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263,
    "renameat": 264, "symlinkat": 266, "readlinkat": 267, "sync_file_range": 277, "fallocate": 285, "preadv": 295,
    "pwritev": 296, "renameat2": 316, "copy_file_range": 326, "preadv2": 327, "statx": 332,
}  # fmt: skip
NAMES = {number: name for name, number in CALLS.items()}

TRACE_SYSGOOD, TRACE_FORK, TRACE_VFORK, TRACE_CLONE, TRACE_EXEC, TRACE_SECCOMP, EXIT_KILL = (
    1,
    2,
    4,
    8,
    16,
    0x80,
    1 << 20,
)
EVENT_SECCOMP, EVENT_STOP = 7, 128
_CONT, _GETREGS, _SETREGS, _SYSCALL, _SEIZE, _LISTEN = 7, 12, 13, 24, 0x4206, 0x4208
_AUDIT_ARCH_X86_64 = 0xC000003E
_RET_TRACE, _RET_ALLOW = 0x7FF00000, 0x7FFF0000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Registers(ctypes.Structure):
    """`user_regs_struct` of x86-64. A call's number is in orig_rax, its arguments in rdi, rsi, rdx, r10, r8, r9."""

    _fields_ = [  # ctypes wants it so
        (name, ctypes.c_ulonglong)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
            *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def unable() -> str:
    """Why no process can be traced here, in a line; empty where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "tracing needs Linux on x86-64"
    pid = os.fork()
    if pid == 0:
        signal.pause()
    try:
        seize(pid)
    except OSError as error:
        return f"ptrace is not allowed here ({error.strerror})"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return ""


def stop_at_calls(numbers: list[int]) -> None:
    """From now on these calls of this process, and of all that it starts, stop it for its tracer.

    Without a tracer they fail with ENOSYS.
    """
    program = [(0x20, 0, 0, 4), (0x15, 0, len(numbers) + 1, _AUDIT_ARCH_X86_64), (0x20, 0, 0, 0)]
    program += [(0x15, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    program += [(0x06, 0, 0, _RET_ALLOW), (0x06, 0, 0, _RET_TRACE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    given = _Program(len(program), ctypes.cast(code, ctypes.c_void_p))
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or _libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(given), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp")


def seize(pid: int) -> None:
    """Trace a process, and all that it starts; they end with the tracer. The thread that calls this is the tracer."""
    options = TRACE_SYSGOOD | TRACE_FORK | TRACE_VFORK | TRACE_CLONE | TRACE_EXEC | TRACE_SECCOMP | EXIT_KILL
    _ptrace(_SEIZE, pid, 0, options)


def go_on(pid: int, number: int = 0) -> None:
    """Let a stopped thread run; with a number, it gets that signal."""
    _ptrace(_CONT, pid, 0, number)


def go_to_end_of_call(pid: int) -> None:
    """Let a thread run its call, and stop it again where that has ended."""
    _ptrace(_SYSCALL, pid, 0, 0)


def stay_stopped(pid: int) -> None:
    """In a stop of the whole process by SIGSTOP: wait there for SIGCONT."""
    _ptrace(_LISTEN, pid, 0, 0)


def registers(pid: int) -> Registers:
    """Those of a stopped thread."""
    found = Registers()
    _ptrace(_GETREGS, pid, 0, ctypes.addressof(found))
    return found


def set_registers(pid: int, changed: Registers) -> None:
    _ptrace(_SETREGS, pid, 0, ctypes.addressof(changed))


def _ptrace(request: int, pid: int, address: int, data: int) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
