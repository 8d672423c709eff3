"""One target fuzzed in this process, within bounds of time and memory for each input.

Owns what counts as a fault, and which inputs are kept.
"""

import base64
import resource
import signal
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

from int8cli.errors import Int8cliError, NotEnoughMemoryError
from torture.fuzzing import Run, Target, WrongResultError
from torture.fuzzing.coverage import Coverage

_TRACED_S, _BARE_S = 20.0, 5.0  # of processor time; every input is small
_GROWTH_BYTES = 600 << 20  # of the most that was ever resident
_MOST_KEPT = 2000


@dataclass(frozen=True, slots=True)
class Fault:
    """An input that came to a wrong end, and which."""

    target: str
    what: str
    data: bytes

    def line(self) -> str:
        packed = base64.b64encode(zlib.compress(self.data)).decode()
        return f"{self.target}: {self.what}; input (base64 of zlib): {packed if len(packed) < 4000 else '…'}"


class TookTooLongError(BaseException):
    """An input takes more processor time than any should."""


class Fuzzing:
    """One target in one scratch directory. `begins` is told each input before it is read."""

    def __init__(self, target: Target, scratch: Path, random: Random, begins: Callable[[bytes], None]) -> None:
        self._target, self._random, self._begins = target, random, begins
        self._seeds, self._run = target.prepare(scratch)
        self._coverage = Coverage()
        self._kept: list[bytes] = []
        self.runs = self.refused = 0
        self.faults: dict[str, Fault] = {}

    @property
    def steps(self) -> int:
        return len(self._coverage)

    def corpus(self, inputs: list[bytes]) -> None:
        """Go through what was found before, and what is valid: that must be read."""
        for data in self._seeds:
            self._try(data, must_be_read=True)
        for data in inputs:
            self._try(data)

    def work(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # Half of the time one of the latest: they are at the edge of what is reached.
            pool = self._kept[-20:] if self._random.random() < 0.5 else self._kept
            data, other = self._random.choice(pool or self._seeds), self._random.choice(self._kept or self._seeds)
            self._try(self._target.mutate(self._random, data, other))

    def _try(self, data: bytes, *, must_be_read: bool = False) -> None:
        self.runs += 1
        self._begins(data)
        before = len(self._coverage)
        with self._coverage.traced():
            what = _end_of(self._run, data, _TRACED_S)
        if what == _TOO_LONG:
            what = _end_of(self._run, data, _BARE_S)  # tracing alone may take as long
        if what == _REFUSED:
            self.refused += 1
            what = "a valid file is refused" if must_be_read else None
        if what is not None:
            self.faults.setdefault(what, Fault(self._target.name, what, data))
        if (len(self._coverage) > before or must_be_read) and len(self._kept) < _MOST_KEPT:
            self._kept.append(data)


_TOO_LONG = f"takes more than {_BARE_S:.0f} s"
_REFUSED = "refused"


def _end_of(run: Run, data: bytes, limit_s: float) -> str | None:
    """How the reading of an input ends: None where it is read, or what is wrong."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with _at_most(limit_s):
            run(data)
    except NotEnoughMemoryError as error:
        return f"asks for more memory than there is: {error}"
    except Int8cliError:
        return _REFUSED
    except TookTooLongError:
        return _TOO_LONG
    except WrongResultError as error:
        return str(error)
    except BaseException as error:  # whatever it is: pyo3's panics are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__} at {_place(error)}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024
    return f"takes {grown / 1e6:.0f} MB" if grown > _GROWTH_BYTES else None


def _place(error: BaseException) -> str:
    """The innermost place in int8cli that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "int8cli/" in frame.filename]
    if not frames:
        return "a place outside int8cli"
    return f"{frames[-1].filename.rpartition('int8cli/')[2]}:{frames[-1].lineno}: {str(error)[:100]!r}"


@contextmanager
def _at_most(limit_s: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TookTooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
