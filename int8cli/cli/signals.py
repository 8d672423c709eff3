"""SIGTERM and SIGHUP end the program as Ctrl-C does: cleanly, and soon.

Owns their handlers. Only the program installs them; users of the library handle signals themselves.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from int8cli.report.text import printable

# Python runs a handler between two steps of the main thread. A step can take long: the product of a large layer, a read
# from a disk that does not respond. After this time the process ends immediately, as if killed; a run can be resumed.
_CLEAN_END_S = 1.5
_PRINTING_S = 0.2
_SHOW_CURSOR = "\x1b[?25h"  # progress bars hide it
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_received: list[int] = []


@dataclass(slots=True)
class _Pardons:
    """Interrupts that do not end the program, as the main thread's handler and the thread that ends it count them.

    `asking` is set by the first interrupt while it is there. The handler may run late, in a long step of the main
    thread, so the thread counts one interrupt ahead of it.
    """

    asking: threading.Event | None = None
    granted: int = 0
    used: int = 0

    def used_one(self) -> bool:
        asking = self.asking
        ahead = asking is not None and not asking.is_set() and self.used == self.granted
        if self.used < self.granted or ahead:
            self.used += 1
            return True
        return False


_pardons = _Pardons()
_printed = threading.Lock()
_resumes = threading.Event()  # set while a command runs that continues the work of an interrupted one


class EndedBySignal(KeyboardInterrupt):
    """A signal that asks the program to end. `name` is its name in the system, such as SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name


def end_on_signals() -> None:
    """Make both signals raise EndedBySignal in the main thread. A signal that is ignored, as under nohup, stays so.

    After these signals, and after Ctrl-C, the process ends within two seconds, whatever it is doing.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    with suppress(OSError, RuntimeError):  # no descriptor or thread left: signals are still handled between two steps
        received, sender = os.pipe()
        os.set_blocking(sender, False)
        threading.Thread(target=_end_in_time, args=(received,), daemon=True).start()
        signal.set_wakeup_fd(sender, warn_on_full_buffer=False)


@contextmanager
def first_interrupt_sets(asking: threading.Event) -> Iterator[None]:
    """While this is active, the first Ctrl-C sets `asking`, and the second ends the program.

    `asking` is cleared at the start.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if asking.is_set():
            raise KeyboardInterrupt
        _pardons.granted += 1
        asking.set()

    asking.clear()
    _pardons.asking = asking
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _pardons.asking = None


def received_signal() -> int | None:
    """The number of the first signal that asked the program to end; None if there was none."""
    return _received[0] if _received else None


def announce_resuming() -> None:
    """From now on a message about an interruption may say that the same command resumes."""
    _resumes.set()


def print_interruption(what: str) -> None:
    """Print why the program ends, and how to go on. Only the first call prints."""
    if _printed.acquire(blocking=False):
        with suppress(OSError, ValueError):  # after SIGHUP the terminal may be closed
            to_resume = " to resume" if _resumes.is_set() else ""
            message = f"{what}: run the same command again{to_resume}"
            print(f"\n{printable(message)}", file=sys.stderr, flush=True)


def name_of(interruption: KeyboardInterrupt) -> str:
    """What to call the interruption in a message."""
    return interruption.name if isinstance(interruption, EndedBySignal) else "interrupted"


def _end(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise EndedBySignal(number)


def _end_in_time(received: int) -> None:
    """Run in a thread: read signals from the pipe `received`, and end the process if it does not end by itself."""
    while (number := os.read(received, 1)) and not _ends(number[0]):
        pass
    if not number:
        return
    time.sleep(_CLEAN_END_S)
    name = "interrupted" if number[0] == signal.SIGINT else signal.Signals(number[0]).name
    printing = threading.Thread(target=_print_last, args=(name,), daemon=True)  # stderr may be a pipe that nobody reads
    printing.start()
    printing.join(_PRINTING_S)
    os._exit(128 + number[0])


def _ends(number: int) -> bool:
    return number in _ENDING and not (number == signal.SIGINT and _pardons.used_one())


def _print_last(what: str) -> None:
    with suppress(OSError, ValueError):
        if sys.stderr.isatty():
            sys.stderr.write(_SHOW_CURSOR)
    print_interruption(what)
