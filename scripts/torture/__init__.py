"""Machines that try to make int8cli lose data, and count how often they could.

A machine is a module of this package that is named in MACHINES and has one function:

    def run(seconds: float, seed: int) -> Figures

It works for about `seconds`: the cases that were found before (its CORPUS, a tuple) come first, then others by chance,
drawn from `random.Random(seed)` alone, so that the same seed tries the same cases in the same order, as many as the
time allows. A corpus is gone through whole, however little time there is, and takes a few seconds. A machine takes its
scratch directories from `tempfile`, leaves none, prints nothing, and ends each process that it starts. It uses one core
at a time. What it finds is a line of `Figures.found` that says how to see it again. It imports int8cli and the tests'
`support` (scripts/run_torture.py and tests/test_torture.py have put both on the path), other machines never.

`scripts/run_torture.py` runs them for a given time and prints a table; tests/test_torture.py runs each for seconds.
"""

from dataclasses import dataclass
from typing import Protocol

# In the order of the table. Each is the name of a module here.
MACHINES: tuple[str, ...] = (
    *("kills", "power", "faults", "full_disk", "streams", "hub_faults", "processes", "signals", "headers", "formats"),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a machine did. `runs`: cases that were tried; `wrong`: those with a wrong end, each a line of `found`.

    `unable`: why the machine could not run here, in a line; then all else is zero. `measured`: other figures for the
    table, as text by name, such as the longest time that a signal took.
    """

    machine: str
    runs: int
    wrong: int
    seconds: float
    found: tuple[str, ...] = ()
    measured: tuple[tuple[str, str], ...] = ()
    unable: str = ""


class Machine(Protocol):
    """What a module of a machine looks like."""

    def run(self, seconds: float, seed: int) -> Figures: ...
