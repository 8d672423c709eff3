"""Many processes on one output directory: conversions that are the same, others, with --overwrite, checks; some killed.

Each ends in order: done, or refused in one line. What stands in the end is what one process alone writes.
"""

import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.program import Child, Nursery, Outcome, llama, nursery_in, tree

from torture import Figures
from torture.scratch import scratch_directory
from torture.tally import Tally

PROCESSES = 32
_CONVERT = ("convert", "model", "-o", "out", "-q", "--outliers", "none")
_SAME = (_CONVERT,)
_MIXED = (
    _CONVERT,
    (*_CONVERT, "--overwrite"),
    (*_CONVERT, "--threshold", "5"),
    (*_CONVERT, "--threshold", "5", "--overwrite"),
    ("convert", "model", "-o", "out", "-q", "--outliers", "weights", "--overwrite"),
    ("convert", "model", "-o", "out", "--dry-run"),
    ("verify", "out", "--source", "model"),
)
_ENDS = {0, 1, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM}


@dataclass(frozen=True, slots=True)
class Crowd:
    """A round: what each process runs, its pause after the start of the one before, and the signal that ends it."""

    commands: Sequence[tuple[str, ...]]
    pauses_s: Sequence[float]
    signals: Sequence[int]


def run(seconds: float, seed: int) -> Figures:
    tally = Tally("processes", seconds)
    chance = random.Random(seed)
    rounds, refused = 0, 0
    with scratch_directory() as scratch, nursery_in(scratch) as nursery:
        llama(scratch / "model", layers=1, shards=3)
        alone = nursery.run(*_CONVERT, cwd=scratch)
        if alone.code != 0:
            raise RuntimeError(alone.err)
        right = tree(scratch / "out")
        shutil.rmtree(scratch / "out")
        while tally.time_is_left or not rounds:
            refused += _round(nursery, scratch, tally, _drawn(chance), right, f"seed {seed}, round {rounds}")
            rounds += 1
    tally.measure("rounds", rounds)
    tally.measure("refused", refused)
    return tally.figures()


def _drawn(chance: random.Random) -> Crowd:
    kinds = chance.choice((_SAME, _SAME, _MIXED))
    killing = chance.choice((0.0, 0.0, 0.3))
    return Crowd(
        [chance.choice(kinds) for _ in range(PROCESSES)],
        [chance.choice((0.0, 0.0, 0.01, 0.1)) * chance.random() for _ in range(PROCESSES)],
        [chance.choice((signal.SIGKILL, signal.SIGTERM)) if chance.random() < killing else 0 for _ in range(PROCESSES)],
    )


def _round(nursery: Nursery, scratch: Path, tally: Tally, crowd: Crowd, right: dict[str, bytes], case: str) -> int:
    children: list[Child] = []
    for command, pause_s in zip(crowd.commands, crowd.pauses_s, strict=True):
        time.sleep(pause_s)
        children.append(nursery.start(*command, cwd=scratch))
    for child, number in zip(children, crowd.signals, strict=True):
        if number:
            child.signal(number)
    ends = [child.wait() for child in children]
    for command, end in zip(crowd.commands, ends, strict=True):
        tally.count(_complaint(end), f"{case}, {' '.join(command)}")
    same = set(crowd.commands) == set(_SAME)
    final = nursery.run(*_CONVERT, *(() if same else ("--overwrite",)), cwd=scratch)
    complaint = "" if final.code == 0 else f"exit {final.code}: {final.err[-300:]}"
    if same and not any(crowd.signals) and not any(end.code == 0 for end in ends):
        complaint = complaint or "none of them came to its end"
    found = tree(scratch / "out")
    others = sorted(name for name in found.keys() | right.keys() if found.get(name) != right.get(name))
    tally.count(complaint or (f"in the end {others[:3]} differ" if others else ""), case)
    shutil.rmtree(scratch / "out")
    return sum(end.code == 1 for end in ends)


def _complaint(end: Outcome) -> str:
    if "Traceback" in end.err or end.code not in _ENDS:
        return f"exit {end.code}: {end.err[-300:]}"
    if end.code == 1 and "error: " in end.err and (end.err.count("error: ") != 1 or "hint: " not in end.err):
        return f"not one error and a hint: {end.err[-300:]}"
    return ""
