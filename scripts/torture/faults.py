"""Calls that fail: system calls on the source, the output, the cache and the Hub's sockets, by number and by errno.

A disturbed run ends with exit code 1, one error and a hint, or with 0 and the right bytes: no traceback, no hang. After
it the same command, undisturbed, leaves what it always leaves.
"""

import errno
import random
import shutil
from dataclasses import dataclass

from torture import Figures, kernel
from torture.scenarios import SCENARIOS, Bench, shared_bench, without_times
from torture.tally import Tally
from torture.tracing import ERROR, FILES, SHORT, SOCKETS, Blow

_ALWAYS = 1 << 30
_NUMBERS = (
    "EIO",
    "ENOSPC",
    "EMFILE",
    "ENAMETOOLONG",
    "ESTALE",
    "EACCES",
    "EINTR",
    "ENOMEM",
    "EDQUOT",
    "EROFS",
    "ELOOP",
)
_ON_SOCKETS = ("ECONNRESET", "EPIPE", "ETIMEDOUT", "ENETUNREACH", "EIO", "ENOBUFS")
_NAMES = FILES | SOCKETS


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the so many-th watched call of a run, and to `times` - 1 after it.

    `error` is the name of an errno; without one, a read or write does at most `most_bytes`.
    """

    scenario: str
    nth: int
    error: str = ""
    most_bytes: int = 0
    times: int = 1

    @property
    def blow(self) -> Blow:
        if self.error:
            return Blow(self.nth, ERROR, getattr(errno, self.error), self.times)
        return Blow(self.nth, SHORT, self.most_bytes, self.times)


CORPUS: tuple[Fault, ...] = ()


def run(seconds: float, seed: int) -> Figures:
    tally = Tally("faults", seconds)
    if why := kernel.unable():
        return Figures("faults", 0, 0, 0.0, unable=why)
    chance = random.Random(seed)
    refused = 0
    bench = shared_bench()
    for fault in CORPUS:
        refused += _case(bench, tally, fault)
    while tally.time_is_left:
        refused += _case(bench, tally, _drawn(bench, chance))
    tally.measure("ended with an error of ours", refused)
    return tally.figures()


def _drawn(bench: Bench, chance: random.Random) -> Fault:
    [scenario] = chance.choices(SCENARIOS, [each.every for each in SCENARIOS])
    calls = bench.reference(scenario).calls(_NAMES)
    nth = chance.randint(1, len(calls))
    name, concerned = calls[nth - 1].split(maxsplit=1)
    times = chance.choice((1, 1, 1, 2, 5, _ALWAYS))
    moves_bytes = name.startswith(("read", "write", "pread", "pwrite", "recv", "send"))
    if moves_bytes and chance.random() < 0.4:
        return Fault(scenario.name, nth, most_bytes=chance.choice((1, 7, 100, 4096)), times=times)
    numbers = _ON_SOCKETS if concerned == "socket" else _NUMBERS
    error = chance.choice(numbers)
    return Fault(scenario.name, nth, error, times=1 if error == "EINTR" else times)


def _case(bench: Bench, tally: Tally, fault: Fault) -> bool:
    scenario = next(each for each in SCENARIOS if each.name == fault.scenario)
    reference = bench.reference(scenario)
    directory = bench.new_directory()
    reference.prepare(directory)
    watch = bench.watch(scenario, directory, _NAMES)
    ended = bench.run(scenario, directory, watch, (fault.blow,))
    complaint = ended.complaint(judges=scenario.judges) or reference.not_whole(directory)
    if not complaint and ended.code == 0:
        complaint = "" if without_times(ended.out) == reference.stdout else "exit 0 with another standard output"
        complaint = complaint or reference.difference_but_for_leftovers(directory)
    again = bench.run(scenario, directory)
    complaint = complaint or prefixed("run again: ", reference.difference(directory, again))
    tally.count(complaint, f"{fault}, on {', '.join(ended.traced.struck[:3])}")
    shutil.rmtree(directory)
    return ended.code == 1


def prefixed(prefix: str, text: str) -> str:
    return f"{prefix}{text}" if text else ""
