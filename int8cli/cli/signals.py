"""SIGTERM and SIGHUP end the program as Ctrl-C does: in order, and soon.

Owns their handlers, for the program alone: who uses the library has signals of their own.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

# Python runs a handler between two steps of the main thread. One product of a large layer takes longer than that, and
# so does a disk that does not answer: after this time the process ends as it is, which a run survives at any instant.
_ORDERLY_S = 1.5
_SAYING_S = 0.2
_SHOW_CURSOR = "\x1b[?25h"  # progress bars hide it
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_came: list[int] = []
_to_say = threading.Lock()


class EndedBySignal(KeyboardInterrupt):
    """A signal that asks the program to end. `name` is how the system calls it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name


def end_on_signals() -> None:
    """Have both raise EndedBySignal in the main thread. One that is ignored, as under nohup, stays so.

    After them, and after Ctrl-C, the process lasts two seconds at most, whatever it is doing.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_end_in_time, args=(heard,), daemon=True).start()


def signal_that_came() -> int | None:
    """The number of the first signal that asked for the end."""
    return _came[0] if _came else None


def say_end(what: str) -> None:
    """Say why the program ends, once, where somebody is left to read it."""
    if _to_say.acquire(blocking=False):
        with suppress(OSError, ValueError):  # after a SIGHUP the terminal is gone
            print(f"\n{what}: run the same command again to resume", file=sys.stderr, flush=True)


def name_of(interruption: KeyboardInterrupt) -> str:
    """What to call the reason for the end."""
    return interruption.name if isinstance(interruption, EndedBySignal) else "interrupted"


def _end(number: int, frame: FrameType | None) -> None:
    _came.append(number)
    raise EndedBySignal(number)


def _end_in_time(heard: int) -> None:
    """In a thread: end the process if it has not ended in order some time after a signal, which `heard` tells of."""
    while (came := os.read(heard, 1)) and came[0] not in _ENDING:
        pass
    number = came[0]
    time.sleep(_ORDERLY_S)
    what = "interrupted" if number == signal.SIGINT else signal.Signals(number).name
    saying = threading.Thread(target=_say_at_last, args=(what,), daemon=True)  # nobody may be reading stderr
    saying.start()
    saying.join(_SAYING_S)
    os._exit(128 + number)


def _say_at_last(what: str) -> None:
    with suppress(OSError, ValueError):
        if sys.stderr.isatty():
            sys.stderr.write(_SHOW_CURSOR)
    say_end(what)
