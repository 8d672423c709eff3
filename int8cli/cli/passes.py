"""Progress of passes over files, on stderr: a bar on a terminal, a line a file elsewhere, nothing with --quiet."""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from int8cli.cli.progress import BarObserver, LineObserver, ProgressObserver
from int8cli.report.units import human_bytes
from int8cli.verify import VerifyObserver


class PassObserver(ProgressObserver, VerifyObserver):
    """Says nothing; the base of those that do."""


class _Lines(LineObserver, PassObserver):
    """One line for each file that a pass is through with."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._task = ""
        self._sizes: dict[str, int] = {}
        self._left: dict[str, int] = {}

    def pass_started(self, task: str, sizes: Mapping[str, int]) -> None:
        self._task, self._sizes, self._left = task, dict(sizes), dict(sizes)

    def pass_progressed(self, file: str, count: int) -> None:
        with self._lock:
            self._left[file] -= count
            if self._left[file] > 0:
                return
            through = sum(1 for left in self._left.values() if left <= 0)
            self.noted(f"{self._task} [{through}/{len(self._sizes)}] {file}: {human_bytes(self._sizes[file])}")


class _Bar(BarObserver, PassObserver):
    """A bar over all bytes of a pass, with the file at work."""

    def pass_started(self, task: str, sizes: Mapping[str, int]) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._positions = {file: index for index, file in enumerate(sizes, start=1)}
        self._task = self._progress.add_task(task, total=sum(sizes.values()))
        self._progress.start()

    def pass_progressed(self, file: str, count: int) -> None:
        self.progressed(file, file, count)


@contextmanager
def observe_passes(*, quiet: bool) -> Iterator[PassObserver]:
    """The observer that fits where stderr goes; what it shows is gone when the context ends."""
    observer: PassObserver
    if quiet:
        observer = PassObserver()
    elif sys.stderr.isatty():
        observer = _Bar()
    else:
        observer = _Lines()
    try:
        yield observer
    finally:
        observer.close()
