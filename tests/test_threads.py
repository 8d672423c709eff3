"""The threads of a pass: all have ended when the pass ends, in whatever way."""

import os
import signal
import threading
import time

import pytest

from int8cli.workers.threads import run_in_threads


def test_all_threads_work_and_end() -> None:
    seen: list[int] = []
    before = threading.active_count()
    run_in_threads(lambda: seen.append(threading.get_ident()), 4, lambda error: pytest.fail(str(error)))
    assert len(seen) == 4
    assert threading.active_count() == before


@pytest.mark.parametrize("instant", range(20))
def test_an_interrupt_while_threads_start_leaves_no_threads(instant: int) -> None:
    stopping = threading.Event()
    told: list[BaseException] = []
    turns = iter(range(1000))

    def work() -> None:
        if next(turns) == instant:
            os.kill(os.getpid(), signal.SIGINT)
        while not stopping.is_set():
            time.sleep(0.001)

    def stop(interruption: BaseException) -> None:
        told.append(interruption)
        stopping.set()

    with pytest.raises(KeyboardInterrupt):
        run_in_threads(work, 20, stop)
    assert [type(error) for error in told] == [KeyboardInterrupt]
    late = [thread for thread in threading.enumerate() if "run_in_threads" in thread.name or "(run)" in thread.name]
    for thread in late:  # one whose start was interrupted may still be on its way to its end
        thread.join(10)
    assert not any(thread.is_alive() for thread in late)
    assert not any(thread.daemon for thread in late)
