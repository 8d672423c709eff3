"""Progress of a calibration on stderr: a bar on a terminal, a line a block elsewhere, nothing with --quiet."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from int8cli.cli.progress import BarObserver, LineObserver, ProgressObserver
from int8cli.model.observer import CalibrationObserver
from int8cli.report.units import human_bytes


class InspectObserver(ProgressObserver, CalibrationObserver):
    """Says nothing; the base of those that do."""

    def noted(self, message: str) -> None: ...

    def started(self, *_: object) -> None: ...


class _Lines(LineObserver, InspectObserver):
    """One line for each block."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks, self._done, self._begun_s = 0, 0, 0.0

    def started(self, blocks: int, finished: int, block_bytes: int, tokens: int) -> None:  # type: ignore[override]
        self._blocks, self._done = blocks, finished
        for line in beginning(blocks, finished, block_bytes, tokens):
            self.noted(line)

    def block_started(self, name: str, weight_bytes: int) -> None:
        self._begun_s = time.monotonic()

    def block_finished(self, name: str) -> None:
        self._done += 1
        self.noted(f"[{self._done}/{self._blocks}] {name} in {time.monotonic() - self._begun_s:.1f} s")


class _Bar(BarObserver, InspectObserver):
    """A bar over the sequences of all blocks, with the block at work."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks, self._done = 0, 0

    def started(self, blocks: int, finished: int, block_bytes: int, tokens: int) -> None:  # type: ignore[override]
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        for line in beginning(blocks, finished, block_bytes, tokens):
            self.noted(line)
        self._blocks, self._done = blocks, finished
        self._progress.stop()  # of an earlier pass
        self._progress = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=blocks, completed=finished)
        self._progress.start()

    def sequence_done(self, name: str, sequence: int, sequences: int) -> None:
        if self._task is not None:
            where = f"block {self._done + 1}/{self._blocks} {name}"
            self._progress.update(self._task, completed=self._done + sequence / sequences, description=where)

    def block_finished(self, name: str) -> None:
        self._done += 1


@contextmanager
def observe_inspection(*, quiet: bool) -> Iterator[InspectObserver]:
    """The observer that fits where stderr goes; what it shows is gone when the context ends."""
    observer = InspectObserver() if quiet else _Bar() if sys.stderr.isatty() else _Lines()
    try:
        yield observer
    finally:
        observer.close()


def beginning(blocks: int, finished: int, block_bytes: int, tokens: int) -> Iterator[str]:
    size = human_bytes(block_bytes)
    yield f"running {tokens:,} tokens through {blocks} blocks of up to {size}, one in memory at a time"
    if finished:
        yield f"going on: {finished} of {blocks} blocks are done"
