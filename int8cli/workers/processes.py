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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from multiprocessing.synchronize import Lock
from types import ModuleType
from typing import Any, Protocol, TypeVar

from int8cli.workers.torch_start import start_torch

Result = TypeVar("Result")
# Shard, tensor, bytes of the source done since the last call. With none it only asks, by returning, whether to go on:
# nobody is told.
OnBytes = Callable[[str, str, int], None]

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
            future.set_result(task(self._report))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass

    def _report(self, shard: str, tensor: str, count: int) -> None:
        if count:
            self._on_bytes(shard, tensor, count)


class ProcessExecutor:
    """Runs tasks in `slots` processes of their own; tasks and results are pickled.

    Each process holds a duplicate of the output directory's lock, so that a killed parent does not let a second run in
    while one of them still writes, and ends as soon as its parent has ended. `preload` names the module that the server
    of the processes imports, once for all of them.
    """

    def __init__(self, slots: int, lock: int, on_bytes: OnBytes, preload: str) -> None:
        self.slots = slots
        self._on_bytes = on_bytes
        context = multiprocessing.get_context(_START_METHOD)
        context.set_forkserver_preload([preload])
        # A pipe rather than a queue, a byte rather than an Event: no lock that we wait for may die with a worker.
        self._reports, self._reporter = context.Pipe(duplex=False)
        self._stop = context.RawValue("b", 0)
        with _starting_processes():  # a lock may start one that cleans up after it
            turn = context.Lock()
        start = partial(_start_worker, _Lock(lock), self._reporter, turn, self._stop)
        self._pool = ProcessPoolExecutor(slots, mp_context=context, initializer=start)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def submit(self, task: Callable[[OnBytes], Result]) -> "Future[Result]":
        with _starting_processes():
            return self._pool.submit(_run, task)

    def close(self) -> None:
        self._stop.value = 1
        self._pool.shutdown(cancel_futures=True)
        self._reporter.close()
        self._listener.join()

    def _listen(self) -> None:
        """Pass progress on until no process is left that could send any."""
        with suppress(EOFError):
            while True:
                self._on_bytes(*self._reports.recv())


def start_server(preload: str) -> None:
    """Start the server that processes are forked from, unless it runs: it imports `preload` in the background.

    It ends with this process.
    """
    if _START_METHOD == "forkserver":
        with _starting_processes():
            forkserver.set_forkserver_preload([preload])
            forkserver.ensure_running()


@contextmanager
def _starting_processes() -> Iterator[None]:
    """Around what may start a process.

    `__main__` is hidden from it, which multiprocessing would run anew: no task is defined there.
    """
    main = sys.modules["__main__"]
    with _own_modules_only(), _blocked(signal.SIGHUP):  # what is started inherits that, and outlives the terminal
        resource_tracker.ensure_running()  # ahead of the mask: to start it ends with SIGINT unblocked
        with _uninterrupted():
            try:
                sys.modules["__main__"] = ModuleType("__main__")
                yield
            finally:
                sys.modules["__main__"] = main


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A Ctrl-C counts at the end, as do SIGTERM and SIGHUP where this process has handlers for them.

    A process that is started meanwhile inherits the mask, so that one, which a terminal sends to all of them, cannot
    hit it before it ignores the signal. In this process another thread may take the signal, and the main one would then
    stop with a process started that nobody knows of, and wait for it for good: hence the handler.
    """
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    replaced = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        replaced = {}
    for number in replaced:
        signal.signal(number, lambda number, frame: came.append(number))
    # SIGTERM is not blocked: with it a pool ends its processes.
    try:
        with _blocked(signal.SIGINT):
            yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _own_modules_only() -> Iterator[None]:
    """A process finds modules where this one does, and not first of all in the working directory.

    That may be a checkpoint's, and nothing of a checkpoint is ever run.
    """
    paths = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    before = {name: os.environ.get(name) for name in paths}
    try:
        os.environ.update(paths)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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


def _start_worker(lock: "_Lock", reporter: Connection, turn: Lock, stop: Any) -> None:
    global _report
    for number in (signal.SIGINT, signal.SIGHUP):  # which a terminal sends to all: the parent decides what they mean
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start_torch()

    def report(shard: str, tensor: str, count: int) -> None:
        if stop.value:
            raise StoppedError
        if count:
            with turn:
                reporter.send((shard, tensor, count))

    _report = report


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _run(task: Callable[[OnBytes], Result]) -> Result:
    return task(_report)
