"""SIGTERM, SIGHUP and SIGINT at any instant: the run ends soon and in order, says so, and can be resumed.

Measures how long that takes, by phase: while the interpreter starts, and at system calls of downloads, conversions,
calibrations and evaluations. An end after more than LIMIT_S is counted as late, and is wrong after three times as long:
machines have other things to do as well.
"""

import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field

from support.program import outcome_of, start

from torture import Figures, kernel
from torture.scenarios import SCENARIOS, Bench, Scenario, shared_bench
from torture.tally import Tally
from torture.tracing import FILES, SIGNAL, SOCKETS, Blow

LIMIT_S = 2.0
START = "start"
PHASES = {
    START: ("plain", "weights", "evaluate", "dequantize", "report", "status", "generate"),
    "download": ("hub", "hub weights", "hub keep", "hub activations"),
    "conversion": ("plain", "weights", "bin", "overwrite", "compressed-tensors"),
    "workers": ("two workers",),
    "calibration": ("activations", "inspect-outliers"),
    "evaluation": ("evaluate", "evaluate to a page"),
    "reading": ("status", "report", "verify", "verify with source", "estimate", "estimate hub"),
    "restoring": ("dequantize",),
    "generation": ("generate",),
}
_NUMBERS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}
_LATEST_START_S = 3.0


@dataclass
class _Times:
    """Seconds from the signal to the end of the process."""

    of: dict[str, list[float]] = field(default_factory=dict)
    too_late: int = 0  # signals that came when all was done

    def add(self, phase: str, took_s: float) -> None:
        self.of.setdefault(phase, []).append(took_s)


def run(seconds: float, seed: int) -> Figures:
    tally = Tally("signals", seconds)
    if why := kernel.unable():
        return Figures("signals", 0, 0, 0.0, unable=why)
    chance = random.Random(seed)
    times = _Times()
    bench = shared_bench()
    while tally.time_is_left:
        phase = chance.choice(sorted(PHASES))
        name = chance.choice(PHASES[phase])
        scenario = next(each for each in SCENARIOS if each.name == name)
        number = chance.choice(sorted(_NUMBERS))
        case = _at_start if phase == START else _at_call
        case(bench, tally, chance, phase, scenario, signal.Signals(number), times)
    for phase, took in sorted(times.of.items()):
        late = sum(each > LIMIT_S for each in took)
        tally.measure(
            phase, f"median {sorted(took)[len(took) // 2]:.2f} s, longest {max(took):.2f} s, {late} late of {len(took)}"
        )
    return tally.figures()


def _at_call(
    bench: Bench,
    tally: Tally,
    chance: random.Random,
    phase: str,
    scenario: Scenario,
    number: signal.Signals,
    times: _Times,
) -> None:
    reference = bench.reference(scenario)
    names = FILES | SOCKETS
    nth = chance.randint(1, len(reference.calls(names)))
    directory = bench.new_directory()
    reference.prepare(directory)
    ended = bench.run(scenario, directory, bench.watch(scenario, directory, names), (Blow(nth, SIGNAL, number),))
    complaint = ended.complaint((0, _NUMBERS[number])) or reference.not_whole(directory)
    if not complaint and ended.code:
        times.add(phase, ended.traced.after_s)
        complaint = _wrong_end(ended.err, number, ended.traced.after_s)
    again = reference.difference(directory, bench.run(scenario, directory))
    struck = ", ".join(ended.traced.struck)
    tally.count(
        complaint or (f"run again: {again}" if again else ""), f"{number.name}, {scenario.name}, call {nth}, {struck}"
    )
    shutil.rmtree(directory)


def _at_start(
    bench: Bench,
    tally: Tally,
    chance: random.Random,
    phase: str,
    scenario: Scenario,
    number: signal.Signals,
    times: _Times,
) -> None:
    """A process that is really started; a signal that comes before it has its handlers ends it as it ends any."""
    reference = bench.reference(scenario)
    directory = bench.new_directory()
    reference.prepare(directory)
    after_s = _LATEST_START_S * chance.random()
    with subprocess.Popen(["true"]):  # not to be counted below: the first Popen of all takes longer
        pass
    process = start(*bench.words(scenario), cwd=directory, env=bench.environment(directory))
    time.sleep(after_s)
    process.send_signal(number)
    sent = time.monotonic()
    outcome = outcome_of(process)
    took_s = time.monotonic() - sent
    times.add(phase, took_s)
    complaint = ""
    if outcome.code not in (0, -number, _NUMBERS[number]):
        complaint = f"exit {outcome.code}: {outcome.err[-400:]}"
    elif outcome.code == _NUMBERS[number]:
        complaint = _wrong_end(outcome.err, number, took_s)
    again = reference.difference(directory, bench.run(scenario, directory))
    tally.count(
        complaint or (f"run again: {again}" if again else ""), f"{number.name}, {scenario.name}, after {after_s:.3f} s"
    )
    shutil.rmtree(directory)


def _wrong_end(err: str, number: signal.Signals, took_s: float) -> str:
    said = "interrupted" if number == signal.SIGINT else number.name
    if "Traceback" in err or err.count(f"{said}: run the same command again") != 1:
        return f"not told in a line: {err[-400:]}"
    return f"took {took_s:.1f} s" if took_s > 3 * LIMIT_S else ""
