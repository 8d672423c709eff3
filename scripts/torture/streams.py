"""Standard streams that cannot be written: closed, on a full disk, a pipe without a reader, or failing at one write.

Messages have no say in how a command ends: with stderr gone, it does what it always does. A result that cannot be
written is exit code 1, with an error and a hint where stderr takes them. Files are the same in every case.
"""

import errno
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from support.program import CLOSED, UNREAD

from torture import Figures, kernel
from torture.launcher import Ended
from torture.scenarios import SCENARIOS, Bench, Scenario, shared_bench, without_times
from torture.tally import Tally
from torture.tracing import ERROR, Blow, Watch

_FULL = "/dev/full"
_GONE = (CLOSED, _FULL, UNREAD)
_NUMBERS = (errno.EIO, errno.ENOSPC, errno.EPIPE)


@dataclass(frozen=True, slots=True)
class Case:
    """`stdout` and `stderr` as in a launcher's request; "" is a file that takes all.

    With `nth`, it is that write to a file of the two that fails, with `number`, and all writes after it.
    """

    scenario: str
    stdout: str = ""
    stderr: str = ""
    nth: int = 0
    number: int = 0


CORPUS: tuple[Case, ...] = (
    Case("plain", stderr=CLOSED),  # was an AttributeError before the conversion had begun
    Case("plain", stderr=_FULL),  # was an end in the middle
    Case("plain", stdout=CLOSED),  # was exit code 0
)


def run(seconds: float, seed: int) -> Figures:
    tally = Tally("streams", seconds)
    chance = random.Random(seed)
    bench = shared_bench()
    traceable = not kernel.unable()
    for case in CORPUS:
        _case(bench, tally, case)
    while tally.time_is_left:
        _case(bench, tally, _drawn(chance, traceable=traceable))
    return tally.figures()


def _drawn(chance: random.Random, *, traceable: bool) -> Case:
    scenario = chance.choice(SCENARIOS).name
    if traceable and chance.random() < 0.3:
        return Case(scenario, nth=chance.randint(1, 5), number=chance.choice(_NUMBERS))
    which = chance.choice(("stdout", "stderr", "both"))
    stdout = "" if which == "stderr" else chance.choice(_GONE)
    stderr = "" if which == "stdout" else chance.choice(_GONE)
    return Case(scenario, stdout, stderr)


def _case(bench: Bench, tally: Tally, case: Case) -> None:
    scenario = next(each for each in SCENARIOS if each.name == case.scenario)
    reference = bench.reference(scenario)
    directory = bench.new_directory()
    reference.prepare(directory)
    if case.nth:
        ended, stdout_fails, stderr_fails = _struck(bench, scenario, directory, case)
    else:
        ended = bench.run(scenario, directory, stdout=case.stdout, stderr=case.stderr)
        stdout_fails, stderr_fails = bool(case.stdout and reference.stdout), bool(case.stderr)
    told = stdout_fails and case.stdout != UNREAD and case.number != errno.EPIPE
    complaint = _wrong_end(ended, stdout_fails=stdout_fails, told=None if stderr_fails else told)
    if not complaint and not stdout_fails and not case.stdout and without_times(ended.out) != reference.stdout:
        complaint = f"another standard output: {ended.out[:200]!r}"
    tally.count(complaint or reference.file_difference(directory), case)
    shutil.rmtree(directory)


def _struck(bench: Bench, scenario: Scenario, directory: Path, case: Case) -> tuple[Ended, bool, bool]:
    """The end, and which of the two streams had a write that failed."""
    out, err = bench.scratch / "stdout", bench.scratch / "stderr"
    watch = Watch(frozenset({"write"}), (str(out), str(err)))
    blow = Blow(case.nth, ERROR, case.number, 1 << 30)
    ended = bench.run(scenario, directory, watch, (blow,), stdout=str(out), stderr=str(err))
    struck = {call.split()[-1] for call in ended.traced.struck}
    ended = replace(ended, out=out.read_text(), err=err.read_text())
    return ended, out.name in struck, err.name in struck


def _wrong_end(ended: Ended, *, stdout_fails: bool, told: bool | None) -> str:
    """What is wrong with an end. `told`: whether stderr has the error; None where it could not be written.

    A reader that goes away, as `| head` does, is no error.
    """
    if ended.code != stdout_fails:
        return f"exit {ended.code}: {ended.err.strip()[-300:]}"
    if "Traceback" in ended.err or "Exception ignored" in ended.err:
        return f"traceback: {ended.err.strip()[-300:]}"
    as_expected = told is None or ended.err.count("error: the result cannot be written") == told
    return "" if as_expected else f"{'not told' if told else 'told'} in a line: {ended.err.strip()[-300:]}"
