"""SIGTERM and SIGHUP end the program as Ctrl-C does: cleanly, and soon.

Owns their handlers. Only the program installs them; users of the library handle signals themselves.
"""

import signal
from types import FrameType

_received: list[int] = []


class EndedBySignal(KeyboardInterrupt):
    """A signal that asks the program to end. `name` is its name in the system, such as SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name


def end_on_signals() -> None:
    """Make both signals raise EndedBySignal in the main thread. A signal that is ignored, as under nohup, stays so."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def received_signal() -> int | None:
    """The number of the first signal that asked the program to end; None if there was none."""
    return _received[0] if _received else None


def _end(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise EndedBySignal(number)
