"""How much memory Linux has available, and how glibc returns memory to it."""

import contextlib
import ctypes
import resource
from pathlib import Path

from int8cli.errors import NotEnoughGpuMemoryError, NotEnoughMemoryError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
# Allocations of this size or more are separate mappings, which return to the system when they are freed. SmolLM2-135M,
# 8,192 tokens: with 4 MiB the peak is 240 MB higher; with 64 KiB page faults take as much time as the model.
_PROMPT_BYTES = 1 << 20
_CGROUP = Path("/sys/fs/cgroup")


def return_memory_promptly(prompt_bytes: int = _PROMPT_BYTES) -> None:
    """Make glibc's malloc return freed allocations of `prompt_bytes` or more, for the rest of the process.

    By default malloc raises its thresholds with each large allocation that is freed, and keeps the memory. The peak of
    a model run in large batches is then many times what it uses. Has no effect with other C libraries.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, prompt_bytes)
        libc.mallopt(_M_TRIM_THRESHOLD, prompt_bytes)
        libc.mallopt(_M_ARENA_MAX, 1)  # only one strand runs at a time: the next reuses the memory that it frees


def return_freed_memory() -> None:
    """Return what malloc keeps of freed allocations to the system, once. Has no effect with other C libraries."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes(device: str) -> int | None:
    """How many more bytes of a device's memory a process may use; None if unknown.

    For the CPU this is the least of what the machine has available, what the process's cgroup has left, and what
    `ulimit -v` leaves of its address space.
    """
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    found = [_machine_bytes(), _group_bytes(), _address_space_bytes()]
    return min((value for value in found if value is not None), default=None)


def too_little_memory(device: str, message: str, hint: str) -> NotEnoughMemoryError:
    """The error where a device has too little memory for what must be loaded at once."""
    kind = NotEnoughGpuMemoryError if device == "cuda" else NotEnoughMemoryError
    return kind(message, hint=hint)


def peak_bytes(device: str) -> int | None:
    """The most memory that this process has had resident, or torch has taken of the GPU; None if unknown."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _machine_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def address_space_limit() -> int | None:
    """The most bytes of address space that this process may take, as by `ulimit -v`; None if any.

    Where there is a limit, memory can be refused.
    """
    limit_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit_bytes == resource.RLIM_INFINITY else limit_bytes


def _address_space_bytes() -> int | None:
    limit_bytes = address_space_limit()
    if limit_bytes is not None:
        with contextlib.suppress(OSError, ValueError):
            taken = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
            return max(0, limit_bytes - taken)
    return None


def _group_bytes() -> int | None:
    """What a cgroup v2 limit leaves. File pages count as free, since the kernel drops them when memory is short."""
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        pages = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return limit - used + int(pages.get("file", "0"))
    return None
