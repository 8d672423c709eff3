"""What a command and all that it starts take: CPU seconds, and memory at its peak.

A process's own figures leave out what it starts and does not wait for, such as the workers of a fork server.
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
    """`peak_bytes`: of the command or, where that is more, of all its processes at once, shared memory counted once.

    The latter is looked at 20 times a second.
    """

    cpu_s: float
    peak_bytes: int
    disk_bytes: int


class ProcessTree:
    """Watches a command's processes from its start to the end of `wait`. `before` are the children that were here."""

    def __init__(self, pid: int, before: Collection[int]) -> None:
        self._pid = pid
        self._before = frozenset(before)
        self._most = 0
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def wait(self) -> tuple[int, Usage]:
        """The command's status, and what it and its processes took; returns when the last of them has ended."""
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
    """Have processes whose parent ends become children of this one meanwhile, so that it can wait for them (Linux)."""
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
    """A process's memory, with what it shares divided among those that share it."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
