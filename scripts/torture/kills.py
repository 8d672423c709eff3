"""SIGKILL at the boundaries of system calls: before any that changes a file of the output, the run is killed.

The same command then runs to its end, and must leave what an unbroken run leaves, byte for byte, reports included.
"""

import random
import shutil

from torture import Figures, kernel
from torture.scenarios import SCENARIOS, WRITING, Bench, Scenario, shared_bench
from torture.tally import Tally
from torture.tracing import CHANGING, KILL, Blow

# Scenario and boundaries at which runs of it are killed, one after the other.
CORPUS: tuple[tuple[str, tuple[int, ...]], ...] = ()


def run(seconds: float, seed: int) -> Figures:
    tally = Tally("kills", seconds)
    if why := kernel.unable():
        return Figures("kills", 0, 0, 0.0, unable=why)
    chance = random.Random(seed)
    bench = shared_bench()
    for name, boundaries in CORPUS:
        _case(bench, tally, next(each for each in SCENARIOS if each.name == name), boundaries)
    drawn = _Boundaries(bench, chance)
    while tally.time_is_left:
        _case(bench, tally, *drawn.next())
    tally.measure("boundaries", drawn.covered())
    return tally.figures()


class _Boundaries:
    """Draws scenarios by chance; of each, every boundary comes once before any comes again."""

    def __init__(self, bench: Bench, chance: random.Random) -> None:
        self._bench, self._chance = bench, chance
        self._left: dict[str, list[int]] = {}
        self._all: dict[str, int] = {}
        self._met: dict[str, set[int]] = {}

    def next(self) -> tuple[Scenario, tuple[int, ...]]:
        [scenario] = self._chance.choices(WRITING, [each.every for each in WRITING])
        if not self._left.get(scenario.name):
            calls = self._bench.reference(scenario).calls(CHANGING, changing=True)
            self._all[scenario.name] = len(calls)
            self._left[scenario.name] = self._chance.sample(range(1, len(calls) + 1), len(calls))
        first = self._left[scenario.name].pop()
        self._met.setdefault(scenario.name, set()).add(first)
        more = [self._chance.randint(1, self._all[scenario.name]) for _ in range(self._chance.choice((0, 0, 0, 1, 2)))]
        return scenario, (first, *more)

    def covered(self) -> str:
        each = (f"{name} {len(self._met[name])}/{self._all[name]}" for name in sorted(self._met))
        return ", ".join(each)


def _case(bench: Bench, tally: Tally, scenario: Scenario, boundaries: tuple[int, ...]) -> None:
    reference = bench.reference(scenario)
    directory = bench.new_directory()
    reference.prepare(directory)
    watch = bench.watch(scenario, directory, CHANGING, changing=True)
    struck = []
    complaint = ""
    for nth in boundaries:
        ended = bench.run(scenario, directory, watch, (Blow(nth, KILL),))
        struck += ended.traced.struck
        complaint = complaint or ended.complaint((0, -9)) or reference.not_whole(directory)
    complaint = complaint or reference.difference(directory, bench.run(scenario, directory))
    tally.count(complaint, f"{scenario.name}, killed at {boundaries}, before {'; '.join(struck)}")
    shutil.rmtree(directory)
