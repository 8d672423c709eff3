"""Where tasks run: in this process, or in several on this machine.

Owns the processes, their lock on the output, and their exit when the parent dies. Knows of a task only that it takes a
progress callback.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from multiprocessing.synchronize import Lock
from types import ModuleType
from typing import Any, Protocol, TypeVar

from int8cli.workers.socket_directory import choose_socket_directory
from int8cli.workers.torch_start import start_torch

Result = TypeVar("Result")
# Called with shard, tensor and the bytes of the source done since the last call. A call with 0 bytes is not reported:
# it only raises StoppedError if the task should stop.
OnBytes = Callable[[str, str, int], None]

# The fork server imports what the tasks need, once for all processes. It is single-threaded when it forks, which this
# process may not be. Apple's libraries do not survive a fork.
_START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"


class Executor(Protocol):
    """Runs tasks `task(on_bytes)` and returns a Future for each; `slots` is the most that run at once."""

    slots: int

    def submit(self, task: Callable[[OnBytes], Result]) -> "Future[Result]": ...

    def close(self) -> None:
        """Stop running tasks at their next block, and wait for them."""


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
    """Runs tasks in `slots` worker processes. Tasks and results are pickled.

    Each worker has a duplicate of the output directory's lock: if the parent is killed, no second run can start while a
    worker still writes. Workers exit as soon as their parent has ended. `preload` names the module that the fork server
    imports.
    """

    def __init__(self, slots: int, lock: int, on_bytes: OnBytes, preload: str) -> None:
        self.slots = slots
        self._on_bytes = on_bytes
        context = multiprocessing.get_context(_START_METHOD)
        context.set_forkserver_preload([preload])
        # A pipe instead of a queue, and a byte instead of an Event: a killed worker must not take a lock with it.
        self._reports, self._reporter = context.Pipe(duplex=False)
        self._stop = context.RawValue("b", 0)
        with _starting_processes():  # a lock may start the resource tracker
            send_lock = context.Lock()
        start = partial(_start_worker, _InheritedLock(lock), self._reporter, send_lock, self._stop)
        self._pool = ProcessPoolExecutor(slots, mp_context=context, initializer=start)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def submit(self, task: Callable[[OnBytes], Result]) -> "Future[Result]":
        """Raises BrokenExecutor if a worker or the fork server ends while a worker is started, or has ended before."""
        try:
            with _starting_processes():
                return self._pool.submit(_run, task)
        except (EOFError, ConnectionError) as error:  # from the pipe to the new worker, or from the fork server's
            raise BrokenExecutor("a worker process ended while it was started") from error

    def close(self) -> None:
        self._stop.value = 1
        self._pool.shutdown(cancel_futures=True)
        self._reporter.close()
        self._listener.join()

    def _listen(self) -> None:
        """Report progress until the last worker has closed its end of the pipe."""
        with suppress(EOFError):
            while True:
                self._on_bytes(*self._reports.recv())


def start_server(preload: str) -> None:
    """Start the fork server, unless it runs already. It imports `preload` in the background and ends with this process.

    Does nothing on systems whose workers are not forked.
    """
    if _START_METHOD == "forkserver":
        with _starting_processes():
            forkserver.set_forkserver_preload([preload])
            forkserver.ensure_running()


@contextmanager
def _starting_processes() -> Iterator[None]:
    """A context for calls that may start a process.

    Hides `__main__`, which multiprocessing would otherwise run again in the process: no task is defined there.
    """
    main = sys.modules["__main__"]
    choose_socket_directory()
    with _own_modules_only(), _blocked(signal.SIGHUP):  # inherited, so that a process outlives the terminal
        resource_tracker.ensure_running()  # before SIGINT is blocked, since starting the tracker unblocks it
        with _uninterrupted():
            try:
                sys.modules["__main__"] = ModuleType("__main__")
                yield
            finally:
                sys.modules["__main__"] = main


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C to the end of the context, and SIGTERM and SIGHUP too if this process handles them.

    A process that starts meanwhile inherits the blocked SIGINT, so a Ctrl-C, which a terminal sends to all processes,
    cannot end it before it ignores the signal. Blocking is not enough in this process: another thread may receive the
    signal, and Python would then interrupt the main thread while it starts a process that nobody ends. So the handlers
    are replaced as well.
    """
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    replaced = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        replaced = {}
    for number in replaced:
        signal.signal(number, lambda number, frame: received.append(number))
    # SIGTERM is not blocked: a pool uses it to end its processes.
    try:
        with _blocked(signal.SIGINT):
            yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


@contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _own_modules_only() -> Iterator[None]:
    """Let a started process import modules from this one's paths only, not from the working directory.

    The working directory may be a checkpoint, and no code of a checkpoint is ever run.
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


class _InheritedLock:
    """The descriptor of a lock. Pickled to a worker, it becomes a duplicate there."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return (_detach, (DupFd(self._descriptor),))


def _detach(duplicate: Any) -> int:
    descriptor: int = duplicate.detach()
    return descriptor


_report: OnBytes


def _start_worker(lock: "_InheritedLock", reporter: Connection, send_lock: Lock, stop: Any) -> None:
    global _report
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all processes; the parent handles them
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start_torch()

    def report(shard: str, tensor: str, count: int) -> None:
        if stop.value:
            raise StoppedError
        if count:
            with send_lock:
                reporter.send((shard, tensor, count))

    _report = report


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _run(task: Callable[[OnBytes], Result]) -> Result:
    return task(_report)
