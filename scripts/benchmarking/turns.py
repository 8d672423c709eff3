"""Runs commands in turn and measures them: seconds until their output is on the disk, CPU time, peak memory.

Does not know what the commands do. Imports nothing large, because the peak memory of a process starts with that of its
parent.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarking.process_tree import ProcessTree, Usage, adopting_orphans, children_of

PIECE_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Case:
    """A command to measure.

    Before each run, `reads` is read into the page cache or, if `cold`, evicted from it. `output` is removed before each
    run and, unless `keeps`, after it. If `output` is None, the command writes nothing, and nothing is flushed
    afterwards. `start` is the same command on almost no data, run in the same turn to measure the start of the process.
    The output of the command goes to `log`.
    """

    name: str
    command: tuple[str, ...]
    reads: Path
    log: Path
    output: Path | None = None
    keeps: bool = False
    cold: bool = False
    start: "Case | None" = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """The cost of one run. `disk_bytes` were read from the disk, not from the page cache."""

    seconds: float
    cpu_s: float
    peak_bytes: int
    disk_bytes: int
    output_bytes: int
    start_s: float = 0.0
    start_cpu_s: float = 0.0

    @property
    def apart_s(self) -> float:
        """Seconds without the start of the process."""
        return self.seconds - self.start_s

    @property
    def apart_cpu_s(self) -> float:
        """CPU seconds without the start of the process."""
        return self.cpu_s - self.start_cpu_s


class CaseFailedError(Exception):
    """A command failed. The message has the last line of its output."""


def take_turns(cases: Sequence[Case], runs: int) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Run every case once, then every case again, and so on, so that temporary slowdowns affect all of them.

    Returns the runs by name, and the reason for each case that failed. A failed case is not run again.
    """
    taken: dict[str, list[Run]] = {case.name: [] for case in cases}
    failures: dict[str, str] = {}
    for turn in range(runs):
        for case in cases:
            if case.name not in failures:
                print(f"turn {turn + 1} of {runs}: {case.name}", file=sys.stderr)
                try:
                    taken[case.name].append(measure(case))
                except CaseFailedError as error:
                    failures[case.name] = str(error)
                    del taken[case.name]
    return taken, failures


def measure(case: Case) -> Run:
    """One run of a case, after one run of its start."""
    start = measure(case.start) if case.start else None
    if case.output is not None:
        shutil.rmtree(case.output, ignore_errors=True)
    os.sync()
    for file in files_of(case.reads):
        _evict(file) if case.cold else _read(file)
    begin = time.perf_counter()
    usage = _run(case)
    if case.output is not None:
        os.sync()
    seconds = time.perf_counter() - begin
    output_bytes = sum(file.stat().st_size for file in files_of(case.output)) if case.output is not None else 0
    if case.output is not None and not case.keeps:
        shutil.rmtree(case.output)
    return Run(
        seconds,
        usage.cpu_s,
        usage.peak_bytes,
        usage.disk_bytes,
        output_bytes,
        start.seconds if start else 0.0,
        start.cpu_s if start else 0.0,
    )


def _run(case: Case) -> Usage:
    before = children_of(os.getpid())
    with adopting_orphans(), case.log.open("wb") as log:
        process = subprocess.Popen(
            case.command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **case.environment}
        )
        try:
            status, usage = ProcessTree(process.pid, before).wait()
        except BaseException:  # an interrupt must end the command too
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = case.log.read_text(errors="replace").strip().splitlines()[-1:]
        raise CaseFailedError(f"ended with {process.returncode}: {' '.join(last)[-200:]}")
    return usage


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in files_of(directory))


def _read(file: Path) -> None:
    piece = bytearray(PIECE_BYTES)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(piece):
            pass


def _evict(file: Path) -> None:
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def median(runs: Sequence[Run], figure: str) -> float:
    return statistics.median(getattr(run, figure) for run in runs)


def median_ratio(runs: Sequence[Run], others: Sequence[Run], figure: str, of: str) -> float:
    """The median over turns of a figure in seconds divided by the figure `of` of the other case in the same turn."""
    pairs = zip(runs, others, strict=True)
    return statistics.median(getattr(run, figure) / getattr(other, of) for run, other in pairs)
