"""SIGTERM and SIGHUP end the program as Ctrl-C does: in order, and soon.

Owns their handlers, for the program alone: who uses the library has signals of their own.
"""

import signal
from types import FrameType

_came: list[int] = []


class EndedBySignal(KeyboardInterrupt):
    """A signal that asks the program to end. `name` is how the system calls it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name


def end_on_signals() -> None:
    """Have both raise EndedBySignal in the main thread. One that is ignored, as under nohup, stays so."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def signal_that_came() -> int | None:
    """The number of the first signal that asked for the end."""
    return _came[0] if _came else None


def _end(number: int, frame: FrameType | None) -> None:
    _came.append(number)
    raise EndedBySignal(number)
