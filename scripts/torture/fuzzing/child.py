"""The process that targets are fuzzed in, one after the other: `main(TARGETS, SECONDS, SEED, CORPUS, SCRATCH)`.

It may crash or stand still: the target at work and its input are in SCRATCH/input then. What was found of each target
is in SCRATCH/TARGET.json once it is done. The address space is bounded.
"""

import json
import os
import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from torture.fuzzing.engine import Fuzzing
from torture.fuzzing.targets import TARGETS

_MORE_BYTES = 3 << 30


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a target; `steps` from line to line were reached."""

    runs: int
    refused: int
    steps: int
    faults: tuple[str, ...]


def main(names: str, seconds: str, seed: str, corpus: str, scratch: str) -> None:
    """`seconds` are for each of the targets."""
    bounded = False
    with Path(scratch, "input").open("wb", buffering=0) as at_hand:
        for name in names.split(","):
            directory = Path(scratch, f"{name}.work")
            directory.mkdir()

            def begins(data: bytes, name: str = name) -> None:
                os.pwrite(at_hand.fileno(), len(data).to_bytes(8, "little") + name.encode().ljust(40) + data, 0)

            begins(b"")
            fuzzing = Fuzzing(TARGETS[name], directory, Random(f"{name} {seed}"), begins)
            if not bounded:
                _bound_memory()
                bounded = True
            found = Path(corpus, name)
            fuzzing.corpus([path.read_bytes() for path in sorted(found.iterdir())] if found.is_dir() else [])
            fuzzing.work(float(seconds))
            faults = tuple(fault.line() for fault in fuzzing.faults.values())
            answer = Answer(fuzzing.runs, fuzzing.refused, fuzzing.steps, faults)
            aside = Path(scratch, "aside")
            aside.write_text(json.dumps(asdict(answer)), encoding="utf-8")
            aside.replace(Path(scratch, f"{name}.json"))


def at_hand(path: Path) -> tuple[str, bytes]:
    """The target and the input that a process had at hand."""
    content = path.read_bytes() if path.exists() else b""
    length = int.from_bytes(content[:8], "little")
    return content[8:48].decode(errors="replace").strip(), content[48 : 48 + length]


def _bound_memory() -> None:
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text(encoding="utf-8").split()[0]) if statm.exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + _MORE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
