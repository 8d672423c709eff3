"""A fuzzer for each format: files and answers changed at will, read within bounds of time and memory.

The targets work in a process of their own, each for its share of the time. If that crashes, or stands still, it is a
fault of the target and input at hand, and another process goes on with the targets after it. What was found before is
in tests/corpus, a directory for each target.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from torture import Figures
from torture.fuzzing.child import Answer, at_hand
from torture.fuzzing.engine import Fault
from torture.fuzzing.targets import TARGETS

_ROOT = Path(__file__).resolve().parents[2]
CORPUS = _ROOT / "tests/corpus"
_STANDSTILL_S = 90.0  # without another input, on a machine that others use too
_START = "import sys; sys.path[:0] = sys.argv[1:4]; from torture.fuzzing.child import main; main(*sys.argv[4:])"


def run(seconds: float, seed: int) -> Figures:
    begun = time.monotonic()
    answers = fuzzed(list(TARGETS), seconds / len(TARGETS), seed)
    found = tuple(fault for answer in answers.values() for fault in answer.faults)
    refused, runs = (sum(getattr(each, what) for each in answers.values()) for what in ("refused", "runs"))
    measured = (
        ("formats", str(len(TARGETS))),
        ("inputs refused", f"{refused:,}"),
        ("steps between lines reached", f"{sum(each.steps for each in answers.values()):,}"),
    )
    return Figures("formats", runs, len(found), time.monotonic() - begun, found, measured)


def fuzzed(names: Sequence[str], seconds: float, seed: int) -> dict[str, Answer]:
    """What came of these targets, each worked on for so many seconds."""
    answers: dict[str, Answer] = {}
    while left := [name for name in names if name not in answers]:
        with tempfile.TemporaryDirectory(prefix="int8cli-fuzz-") as scratch:
            ended = _end_of_process(left, seconds, seed, Path(scratch))
            for name in left:
                path = Path(scratch, f"{name}.json")
                if path.exists():
                    told = json.loads(path.read_text(encoding="utf-8"))
                    answers[name] = Answer(**{**told, "faults": tuple(told["faults"])})
            if ended:
                name, data = at_hand(Path(scratch, "input"))
                name = name if name in left else left[0]
                answers[name] = Answer(1, 0, 0, (Fault(name, ended, data).line(),))
    return answers


def _end_of_process(names: Sequence[str], seconds: float, seed: int, scratch: Path) -> str:
    """How a process over these targets ended; empty where it came to its end."""
    paths = [str(_ROOT), str(_ROOT / "scripts"), str(_ROOT / "tests")]
    command = [
        sys.executable,
        "-c",
        _START,
        *paths,
        ",".join(names),
        str(seconds),
        str(seed),
        str(CORPUS),
        str(scratch),
    ]
    with (scratch / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=scratch, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while _is_at_work(process):
                if _stands_still(scratch / "input"):
                    return "stands still"
        finally:
            process.kill()
            process.wait()
    if process.returncode == 0:
        return ""
    last = (scratch / "output").read_text(errors="replace").strip().splitlines()[-1:]
    return f"the process ends with {process.returncode} ({''.join(last)[:200]})"


def _is_at_work(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        return True
    return False


def _stands_still(at_hand: Path) -> bool:
    return at_hand.exists() and time.time() - at_hand.stat().st_mtime > _STANDSTILL_S
