"""Progress on stderr: a live bar on a terminal, a plain line a shard elsewhere, nothing with --quiet."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column

from int8cli.conversion.convert import ConversionObserver
from int8cli.planning.survey import Survey
from int8cli.records.store import ShardRecord
from int8cli.report.text import printable
from int8cli.report.units import counted, human_bytes
from int8cli.results.conversion import worst_first

NAME_WIDTH = 26  # with bytes, rate, time and shard before it, 80 columns


@contextmanager
def observe(*, quiet: bool) -> Iterator["ProgressObserver"]:
    """The observer that fits where stderr goes; what it shows is gone when the context ends."""
    observer: ProgressObserver
    if quiet:
        observer = ProgressObserver()
    elif sys.stderr.isatty():
        observer = BarObserver()
    else:
        observer = LineObserver()
    try:
        yield observer
    finally:
        observer.close()


class ProgressObserver(ConversionObserver):
    """Says nothing; the base of those that do. Also hears of transfers from the Hub."""

    def received(self, file: str, count: int) -> None:
        """`count` bytes more of a file came from the Hub."""

    def waiting(self, what: str, why: str, pause_s: float) -> None:
        """A transfer failed and is tried again after a pause."""

    def calibration_started(self, total_bytes: int, done_bytes: int) -> None:
        """The model begins to be run, with weights of so many bytes."""

    def calibrated(self, where: str, done_bytes: int) -> None:
        """It has come so far."""

    def block_calibrated(self, line: str) -> None:
        """A block is done; a line about it."""

    def close(self) -> None: ...


class LineObserver(ProgressObserver):
    """One line for each shard, for logs."""

    def __init__(self) -> None:
        self._shards = 0
        self._finished = 0
        self._started_s: dict[str, float] = {}

    def started(self, survey: Survey, finished: frozenset[str]) -> None:
        self._shards, self._finished = len(survey.shards), len(finished)
        for line in preliminaries(survey, finished):
            self.noted(line)

    def shard_started(self, shard: str) -> None:
        self._started_s[shard] = time.monotonic()

    def shard_finished(self, shard: str, record: ShardRecord) -> None:
        self._finished += 1
        elapsed = time.monotonic() - self._started_s[shard]
        self.noted(f"[{self._finished}/{self._shards}] {shard}: {_outcome(record)} in {elapsed:.1f} s")

    def waiting(self, what: str, why: str, pause_s: float) -> None:
        self.noted(f"{what}: {why}; trying again in {pause_s:.0f} s")

    def block_calibrated(self, line: str) -> None:
        self.noted(line)

    def noted(self, message: str) -> None:
        print(printable(message), file=sys.stderr, flush=True)


class BarObserver(ProgressObserver):
    """A bar over all bytes, with the shard and tensor at work, and one for what comes from the Hub."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            BarColumn(bar_width=12),
            DownloadColumn(table_column=Column(no_wrap=True)),
            TransferSpeedColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self._console,
            transient=True,
        )
        self._lock = threading.Lock()
        self._task: TaskID | None = None
        self._transfer: TaskID | None = None
        self._calibration: TaskID | None = None
        self._positions: dict[str, int] = {}

    def started(self, survey: Survey, finished: frozenset[str]) -> None:
        for line in preliminaries(survey, finished):
            self.noted(line)
        self._positions = {contents.file_name: index for index, contents in enumerate(survey.shards, start=1)}
        sizes = {contents.file_name: sum(t.spec.nbytes for t in contents.tensors) for contents in survey.shards}
        done = sum(sizes[shard] for shard in finished)
        self._task = self._progress.add_task("", total=sum(sizes.values()), completed=done)
        self._progress.start()

    def progressed(self, shard: str, tensor: str, source_bytes: int) -> None:
        if self._task is None:
            return
        tensor = printable(tensor)
        name = tensor if len(tensor) <= NAME_WIDTH else f"…{tensor[1 - NAME_WIDTH :]}"
        where = f"{self._positions.get(shard, 0)}/{len(self._positions)} {name}"
        self._progress.update(self._task, advance=source_bytes, description=where)

    def shard_finished(self, shard: str, record: ShardRecord) -> None:
        self.noted(f"{self._positions[shard]}/{len(self._positions)} {shard}: {_outcome(record)}")

    def calibration_started(self, total_bytes: int, done_bytes: int) -> None:
        self._calibration = self._progress.add_task("", total=total_bytes, completed=done_bytes)

    def calibrated(self, where: str, done_bytes: int) -> None:
        if self._calibration is not None:
            self._progress.update(self._calibration, completed=done_bytes, description=printable(where))

    def received(self, file: str, count: int) -> None:
        with self._lock:
            if self._transfer is None:
                self._transfer = self._progress.add_task("", total=None)
            self._progress.update(self._transfer, advance=count, description=f"from the Hub: {file}")

    def waiting(self, what: str, why: str, pause_s: float) -> None:
        self.noted(f"{what}: {why}; trying again in {pause_s:.0f} s")

    def noted(self, message: str) -> None:
        self._console.print(printable(message), soft_wrap=True, markup=False)

    def close(self) -> None:
        self._progress.stop()


def preliminaries(survey: Survey, finished: frozenset[str]) -> Iterator[str]:
    """What to say before the work begins."""
    if finished:
        yield f"going on: {len(finished)} of {len(survey.shards)} shards are done"
    yield from warnings(survey)


def warnings(survey: Survey) -> Iterator[str]:
    """What the user may not have meant, or may want to know beforehand."""
    for pattern in survey.plan.unmatched_patterns:
        yield f"warning: no module matches {pattern!r}"
    if not survey.has_config:
        yield "warning: no config.json beside the weights; loaders will need one with a quantization_config"
    for caveat in survey.target.caveats(survey.plan):
        yield f"warning: {caveat}"
    for contents in survey.shards:
        if not contents.mappable:
            yield f"{contents.file_name}: a legacy .bin cannot be read in pieces; it is loaded whole"


def _outcome(record: ShardRecord) -> str:
    outcome = f"{human_bytes(record.source.size_bytes)} → {human_bytes(record.files[0].size_bytes)}"
    if record.layers:
        outcome += f", {counted(len(record.layers), 'layer')}"
        worst = worst_first(record.layers)[0].sums
        outcome += f", worst error {worst.relative_frobenius_error:.4f}" if worst is not None else ""
    if record.kept:
        outcome += f", {len(record.kept)} kept for non-finite values"
    return outcome
