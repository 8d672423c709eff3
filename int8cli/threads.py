"""Threads over the pieces of one pass.

Owns their start and their end, also where an interrupt comes at an awkward instant. Knows nothing of what they do.
"""

import threading
from collections.abc import Callable


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
