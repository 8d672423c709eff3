"""The CPU time and peak memory of a command and of all processes that it starts.

The usual figures of a process leave out children that it does not wait for, such as the workers of a fork server.
"""

import ctypes
import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class Usage:
    """The resources that a command used.

    `peak_bytes` is the peak memory of the command, or of all its processes together if that is more, with shared memory
    counted once. The latter is sampled 20 times a second.
    """

    cpu_s: float
    peak_bytes: int
    disk_bytes: int


class ProcessTree:
    """Watches the processes of a command until `wait` returns. `before` are earlier children, which are ignored."""

    def __init__(self, pid: int, before: Collection[int]) -> None:
        self._pid = pid
        self._before = frozenset(before)
        self._most = 0
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def wait(self) -> tuple[int, Usage]:
        """The exit status of the command, and the resources it used. Returns after its last process has ended."""
        _, status, own = os.wait4(self._pid, 0)
        usages = [own]
        while orphans := self._children():
            usages += [os.wait4(orphan, 0)[2] for orphan in orphans]
        self._ended.set()
        self._watching.join()
        return status, Usage(
            sum(usage.ru_utime + usage.ru_stime for usage in usages),
            max(self._most, own.ru_maxrss * 1024),
            sum(usage.ru_inblock for usage in usages) * 512,
        )

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._most = max(self._most, sum(_pss_bytes(pid) for child in self._children() for pid in _tree(child)))

    def _children(self) -> list[int]:
        return [pid for pid in children_of(os.getpid()) if pid not in self._before]


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """While this context is open, orphans become children of this process, so that it can wait for them (Linux)."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def _tree(pid: int) -> list[int]:
    return [pid, *(below for child in children_of(pid) for below in _tree(child))]


def _pss_bytes(pid: int) -> int:
    """The memory of a process, with shared memory divided by the number of processes that share it."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
