"""Where shards are converted: in this process, or in several on this machine.

Owns processes, their lock on the output and their end when the parent dies. Knows nothing of what a task does but that
it takes a progress callback.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing.queues import SimpleQueue
from multiprocessing.reduction import DupFd
from multiprocessing.synchronize import Event
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")
OnBytes = Callable[[str, str, int], None]  # shard, tensor, bytes of the source done since the last call


class Executor(Protocol):
    """Runs tasks `task(on_bytes)`, each to a Future; `slots` is how many it can have under way at once."""

    slots: int

    def submit(self, task: Callable[[OnBytes], Result]) -> "Future[Result]": ...

    def close(self) -> None:
        """Stop what is under way, at its next block, and wait for it."""


class InlineExecutor:
    """Runs each task at once, in the calling thread."""

    slots = 1

    def __init__(self, on_bytes: OnBytes) -> None:
        self._on_bytes = on_bytes

    def submit(self, task: Callable[[OnBytes], Result]) -> "Future[Result]":
        future: Future[Result] = Future()
        try:
            future.set_result(task(self._on_bytes))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


class ProcessExecutor:
    """Runs tasks in `slots` fresh processes; tasks and results are pickled.

    Each process holds a duplicate of the output directory's lock, so that a killed parent does not let a second run in
    while one of them still writes, and ends as soon as its parent is gone.
    """

    def __init__(self, slots: int, lock: int, on_bytes: OnBytes) -> None:
        self.slots = slots
        self._on_bytes = on_bytes
        context = multiprocessing.get_context("spawn")
        self._progress: SimpleQueue[tuple[str, str, int] | None] = context.SimpleQueue()
        self._stop = context.Event()
        start = partial(_start_worker, _Lock(lock), self._progress, self._stop)
        self._pool = ProcessPoolExecutor(slots, mp_context=context, initializer=start)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def submit(self, task: Callable[[OnBytes], Result]) -> "Future[Result]":
        return self._pool.submit(_run, task)

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._progress.put(None)
        self._listener.join()

    def _listen(self) -> None:
        while (event := self._progress.get()) is not None:
            self._on_bytes(*event)


class StoppedError(Exception):
    """The parent asked this worker to stop."""


class _Lock:
    """A descriptor that a spawned process gets a duplicate of."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return (_detach, (DupFd(self._descriptor),))


def _detach(duplicate: Any) -> int:
    descriptor: int = duplicate.detach()
    return descriptor


_report: OnBytes


def _start_worker(lock: "_Lock", progress: "SimpleQueue[tuple[str, str, int] | None]", stop: Event) -> None:
    global _report
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(shard: str, tensor: str, count: int) -> None:
        if stop.is_set():
            raise StoppedError
        progress.put((shard, tensor, count))

    _report = report


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _run(task: Callable[[OnBytes], Result]) -> Result:
    return task(_report)
