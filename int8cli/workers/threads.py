"""Threads over the pieces of one pass.

Owns their start, their end (also where an interrupt comes at an awkward instant) and their order where what they do
must happen in one. Knows nothing of what they do.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def run_in_threads(work: Callable[[], None], count: int, stop: Callable[[BaseException], None]) -> None:
    """Run `work` in `count` threads and wait for all of them.

    What interrupts the wait is given to `stop`, which must make `work` end soon, and raised once it has. The threads
    are no daemons: one that is in a tensor operation while the interpreter goes down aborts the process.
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
        stopped.set()  # for one whose start was interrupted: it may not run yet, and cannot be joined
        stop(interruption)
        for thread in threads:
            if thread.is_alive():
                thread.join()
        raise


class TurnAbandonedError(Exception):
    """Another thread failed; there will be no more turns."""


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
