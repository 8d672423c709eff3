"""Lost writes: the power is cut at a system call, and what no fsync has covered is gone.

The run is killed there. Then each file that was written to after its last fsync is emptied, cut, or partly zeros, as
file systems leave them, and each name that no fsync of its directory has covered may be gone too. The same command must
notice, and leave what an unbroken run leaves.
"""

import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torture import Figures, kernel
from torture.scenarios import WRITING, Bench, Scenario, shared_bench
from torture.tally import Tally
from torture.tracing import CHANGING, KILL, RENAMED_TO, Blow

_WRITES = frozenset({"write", "pwrite64", "writev", "pwritev", "sendfile", "copy_file_range", "ftruncate", "fallocate"})
_PAGE_BYTES = 4096
# The cache of the Hub's client has its own ways; what is taken from it is held against published digests.
_OTHERS = "hf/"
# How long a store keeps what it has taken is its own affair.
_ON_THIS_DISK = tuple(each for each in WRITING if not each.to_a_store)


@dataclass
class Pending:
    """What a cut of the power takes, by relative name: data of files, and names in directories."""

    data: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)

    @classmethod
    def after(cls, calls: Iterable[str], root: str) -> "Pending":
        """After these calls, as the tracer writes them down; all paths in them begin with `root`."""
        pending = cls()
        for call in calls:
            name, _, concerned = call.partition(" ")
            pending._after_one(name, *(path.removeprefix(f"{root}/") for path in concerned.split(RENAMED_TO)))
        return pending

    def _after_one(self, name: str, concerned: str, new: str = "") -> None:
        if name in ("open", "openat", "mkdir", "mkdirat", "symlink", "symlinkat"):
            self.names.add(concerned)
        elif name in _WRITES:
            self.data.add(concerned)
        elif name in ("fsync", "fdatasync"):
            self.data.discard(concerned)
            self.names -= {each for each in self.names if each.rpartition("/")[0] == concerned}
        elif name in ("rename", "renameat", "renameat2"):
            if concerned in self.data:
                self.data.remove(concerned)
                self.data.add(new)
            self.names -= {concerned}
            self.names.add(new)


def run(seconds: float, seed: int) -> Figures:
    tally = Tally("power", seconds)
    if why := kernel.unable():
        return Figures("power", 0, 0, 0.0, unable=why)
    chance = random.Random(seed)
    bench = shared_bench()
    lost = 0
    while tally.time_is_left:
        [scenario] = chance.choices(_ON_THIS_DISK, [each.every for each in _ON_THIS_DISK])
        lost += _case(bench, tally, chance, scenario)
    tally.measure("files that lost data or name", lost)
    return tally.figures()


def _case(bench: Bench, tally: Tally, chance: random.Random, scenario: Scenario) -> int:
    reference = bench.reference(scenario)
    calls = reference.calls(CHANGING, changing=True)
    nth = chance.choice((len(calls) + 1, *(chance.randint(1, len(calls)) for _ in range(4))))
    directory = bench.new_directory()
    reference.prepare(directory)
    ended = bench.run(
        scenario, directory, bench.watch(scenario, directory, CHANGING, changing=True), (Blow(nth, KILL),)
    )
    made = ended.traced.calls[:-1] if ended.code else ended.traced.calls
    lost = _lose(directory, Pending.after(made, directory.name), chance)
    again = reference.difference(directory, bench.run(scenario, directory))
    tally.count(again, f"{scenario.name}, cut at call {nth}, {'; '.join(lost)}")
    shutil.rmtree(directory)
    return len(lost)


def _lose(directory: Path, pending: Pending, chance: random.Random) -> list[str]:
    """Take what is pending, or some of it. Returns what was taken, for a person to read."""
    lost = []
    for name in sorted(pending.data):
        path = directory / name
        if not name.startswith(_OTHERS) and path.is_file() and not path.is_symlink() and path.stat().st_size:
            take = chance.choice((_empty, _cut, _zeros, _a_page_of_zeros))
            take(path)
            lost.append(f"{name} {take.__name__.strip('_').replace('_', ' ')}")
    if chance.random() < 0.5:
        return lost
    for name in sorted(pending.names):
        path = directory / name
        if not name.startswith(_OTHERS) and path.is_file() and chance.random() < 0.7:
            path.unlink()
            lost.append(f"{name} gone")
    return lost


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _zeros(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def _a_page_of_zeros(path: Path) -> None:
    """In the middle; of a smaller file, a few bytes."""
    data = bytearray(path.read_bytes())
    page = min(_PAGE_BYTES, max(1, len(data) // 8))
    start = (len(data) - page) // 2
    data[start : start + page] = bytes(page)
    path.write_bytes(data)
