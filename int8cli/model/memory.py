"""How much memory is available, from Linux, and how to return memory to it, through glibc."""

import contextlib
import ctypes
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
# From this size on a block is a mapping of its own and goes back when freed. SmolLM2-135M, 8,192 tokens: with 4 MiB it
# peaks 240 MB higher; with 64 KiB page faults take as much time as the model.
_PROMPT_BYTES = 1 << 20
_CGROUP = Path("/sys/fs/cgroup")


def return_memory_promptly(prompt_bytes: int = _PROMPT_BYTES) -> None:
    """Have glibc's malloc give freed memory back to the system, for the rest of the process.

    Left to itself it raises its thresholds with each large block freed, and keeps what it freed: a model run in large
    batches then peaks at many times what it uses. No effect with other C libraries. Blocks of `prompt_bytes` and more
    go back when they are freed.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, prompt_bytes)
        libc.mallopt(_M_TRIM_THRESHOLD, prompt_bytes)
        libc.mallopt(_M_ARENA_MAX, 1)  # one strand runs at a time: what one frees serves the next


def available_bytes(device: str) -> int | None:
    """Memory of a device that a process may still take; None if unknown.

    Of the processor it is the machine's, or what its control group has left if that is less.
    """
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    found = [_machine_bytes(), _group_bytes()]
    return min((value for value in found if value is not None), default=None)


def peak_bytes(device: str) -> int | None:
    """The most memory that this process has had resident, or torch has taken of the GPU; None if unknown."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _machine_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _group_bytes() -> int | None:
    """What a cgroup v2 limit leaves; file pages count as free, since they are dropped when memory is short."""
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        pages = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return limit - used + int(pages.get("file", "0"))
    return None
