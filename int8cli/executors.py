"""Where shards are converted: in this process, or in several on this machine.

Owns processes, their lock on the output and their end when the parent dies. Knows nothing of what a task does but that
it takes a progress callback.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from multiprocessing.synchronize import Lock
from typing import Any, Protocol, TypeVar

from int8cli.torch_start import start_torch

Result = TypeVar("Result")
OnBytes = Callable[[str, str, int], None]  # shard, tensor, bytes of the source done since the last call

# A server that has imported what the tasks need, and forks: one import and one copy of it for all processes. It has one
# thread when it forks, which this process may not. Apple's libraries do not bear a fork.
_START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"


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
    """Runs tasks in `slots` processes of their own; tasks and results are pickled. `preload`: a module they all need.

    Each process holds a duplicate of the output directory's lock, so that a killed parent does not let a second run in
    while one of them still writes, and ends as soon as its parent is gone.
    """

    def __init__(self, slots: int, lock: int, on_bytes: OnBytes, preload: str) -> None:
        self.slots = slots
        self._on_bytes = on_bytes
        context = multiprocessing.get_context(_START_METHOD)
        context.set_forkserver_preload([preload])
        # A pipe rather than a queue, a byte rather than an Event: no lock that we wait for may die with a worker.
        self._heard, self._told = context.Pipe(duplex=False)
        self._stop = context.RawValue("b", 0)
        start = partial(_start_worker, _Lock(lock), self._told, context.Lock(), self._stop)
        self._pool = ProcessPoolExecutor(slots, mp_context=context, initializer=start)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def submit(self, task: Callable[[OnBytes], Result]) -> "Future[Result]":
        # The server starts with the first task. It and its forks inherit the mask, so that a Ctrl-C, which a terminal
        # sends to all of them, cannot hit one before it ignores the signal.
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(_run, task)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)

    def close(self) -> None:
        self._stop.value = 1
        self._pool.shutdown(cancel_futures=True)
        self._told.close()
        self._listener.join()

    def _listen(self) -> None:
        """Pass progress on until no process is left that could send any."""
        with suppress(EOFError):
            while True:
                self._on_bytes(*self._heard.recv())


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


def _start_worker(lock: "_Lock", told: Connection, turn: Lock, stop: Any) -> None:
    global _report
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start_torch()

    def report(shard: str, tensor: str, count: int) -> None:
        if stop.value:
            raise StoppedError
        with turn:
            told.send((shard, tensor, count))

    _report = report


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _run(task: Callable[[OnBytes], Result]) -> Result:
    return task(_report)
