"""Threads that share the work of one pass.

Owns how they start, how they end (even if an interrupt arrives while they start), and turns for work that must happen
in order. Knows nothing of the work.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def run_in_threads(work: Callable[[], None], count: int, stop: Callable[[BaseException], None]) -> None:
    """Run `work` in `count` threads and wait for all of them.

    If the wait is interrupted, `stop` is called with the exception and must make `work` end soon; the exception is
    raised after all threads have ended. They are not daemons: a daemon that is in a tensor operation while the
    interpreter shuts down aborts the process.
    """
    stopped = threading.Event()

    def run() -> None:
        if not stopped.is_set():
            work()

    threads = [threading.Thread(target=run) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as interruption:
        stopped.set()  # for a thread whose start was interrupted: it may not run yet, and cannot be joined
        stop(interruption)
        for thread in threads:
            if thread.is_alive():
                thread.join()
        raise


class TurnAbandonedError(Exception):
    """Another thread failed, so there are no more turns."""


class Turnstile:
    """Lets threads through one at a time in the order of their tickets 0, 1, 2, …"""

    def __init__(self) -> None:
        self._next = 0
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, ticket: int) -> Iterator[None]:
        """Wait for every earlier ticket. Raises TurnAbandonedError once `close` was called."""
        with self._changed:
            self._changed.wait_for(lambda: self._next == ticket or self._closed)
            if self._closed:
                raise TurnAbandonedError
        yield
        with self._changed:
            self._next += 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
