"""A disk that is full at any point of a command: a file system in memory, with room for a part of what it writes.

The command ends with one error and a hint, leaves no half file under a final name, and completes once there is room.
"""

import random
import shutil

from torture import Figures, mounts
from torture.scenarios import WRITING, Bench, Scenario, shared_bench
from torture.tally import Tally

_AMPLE_BYTES = 1 << 28
_BLOCK_BYTES = 4096


def run(seconds: float, seed: int) -> Figures:
    tally = Tally("full_disk", seconds)
    bench = shared_bench()
    if why := mounts.unable(bench.scratch / "mounted"):
        return Figures("full_disk", 0, 0, 0.0, unable=why)
    chance = random.Random(seed)
    refused = 0
    while tally.time_is_left:
        [scenario] = chance.choices(WRITING, [each.every for each in WRITING])
        refused += _case(bench, tally, chance, scenario)
    tally.measure("ended with an error of ours", refused)
    return tally.figures()


def _case(bench: Bench, tally: Tally, chance: random.Random, scenario: Scenario) -> bool:
    reference = bench.reference(scenario)
    directory = bench.new_directory()
    inodes = chance.random() < 0.2
    with mounts.memory_disk(directory, _AMPLE_BYTES) as disk:
        reference.prepare(directory)
        used, used_files = disk.used()
        written = sum(-(-len(data) // _BLOCK_BYTES) + 2 for data in reference.files.values())
        blocks = chance.randint(0, 2 * written)
        files = chance.randint(1, 2 * len(reference.files))
        disk.resize(used + blocks * _BLOCK_BYTES, used_files + files if inodes else 0)
        ended = bench.run(scenario, directory)
        complaint = ended.complaint() or reference.not_whole(directory)
        disk.resize(_AMPLE_BYTES, 0)
        again = reference.difference(directory, bench.run(scenario, directory))
        limit = f"{files} files" if inodes else f"{blocks} blocks"
        tally.count(complaint or (f"run again: {again}" if again else ""), f"{scenario.name}, room for {limit}")
    shutil.rmtree(directory)
    return ended.code == 1
