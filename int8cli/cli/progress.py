"""Progress on stderr: bars on a terminal, a line for each finished part elsewhere, nothing with --quiet."""

import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich import progress as bars
from rich.table import Column
from rich.text import Text

from int8cli.progress import BYTES, SILENT, Progress
from int8cli.report.terminal import stderr_console
from int8cli.report.text import printable
from int8cli.results.units import human_bytes

NAME_WIDTH = 26  # leaves room for bytes, rate, time and position in 80 columns


@contextmanager
def shown_progress(*, quiet: bool) -> Iterator[Progress]:
    """Bars on a terminal, lines elsewhere, nothing with `quiet`. Bars disappear when the context ends."""
    if quiet:
        yield SILENT
    elif not sys.stderr.isatty():
        yield ProgressLines()
    else:
        shown = ProgressBars()
        try:
            yield shown
        finally:
            shown.close()


@dataclass(slots=True)
class _Task:
    """A running task: the amount of each part, its unit, and the finished parts."""

    parts: dict[str, int]
    unit: str
    finished: set[str]
    started_s: dict[str, float] = field(default_factory=dict)


class ProgressLines:
    """One line for each finished part, for logs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[str, _Task] = {}

    def begin(self, task: str, parts: Mapping[str, int], *, unit: str = BYTES, finished: Collection[str] = ()) -> None:
        self._tasks[task] = _Task(dict(parts), unit, set(finished))

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
        if amount == 0:
            self._tasks[task].started_s[part] = time.monotonic()

    def note(self, message: str) -> None:
        print(f"{printable(message)}\n", end="", file=sys.stderr, flush=True)  # one write: other threads print too

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
        if part is None:
            return
        known = self._tasks[task]
        with self._lock:
            known.finished.add(part)
            line = f"[{len(known.finished)}/{len(known.parts)}] {part}"
        if outcome:
            line += f": {outcome}"
        else:
            line = f"{task} {line}" + (f": {human_bytes(known.parts[part])}" if known.unit == BYTES else "")
        started_s = known.started_s.get(part)
        self.note(line if started_s is None else f"{line} in {time.monotonic() - started_s:.1f} s")


class _Amount(bars.ProgressColumn):
    """Bytes done of the total, or the percentage of steps."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._bytes = bars.DownloadColumn()

    def render(self, task: bars.Task) -> Text:
        return self._bytes.render(task) if task.fields["unit"] == BYTES else Text(f"{task.percentage:.0f} %")


class _Rate(bars.ProgressColumn):
    """Bytes per second. Steps take too long for a rate."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._bytes = bars.TransferSpeedColumn()

    def render(self, task: bars.Task) -> Text:
        return self._bytes.render(task) if task.fields["unit"] == BYTES else Text()


class ProgressBars:
    """A bar for each running task, with its current part, and a line for each outcome."""

    def __init__(self) -> None:
        self._console = stderr_console()
        self._bars = bars.Progress(
            bars.BarColumn(bar_width=12),
            _Amount(),
            _Rate(),
            bars.TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            bars.TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self._console,
            transient=True,
        )
        self._shown: dict[str, bars.TaskID] = {}
        self._positions: dict[str, dict[str, int]] = {}

    def begin(self, task: str, parts: Mapping[str, int], *, unit: str = BYTES, finished: Collection[str] = ()) -> None:
        self._remove(task)
        self._positions[task] = {part: place for place, part in enumerate(parts, start=1)}
        total = sum(parts.values()) if parts else None
        completed = sum(parts[part] for part in finished)
        self._shown[task] = self._bars.add_task("", total=total, completed=completed, unit=unit)
        self._bars.start()

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
        name = printable(detail or part)
        if self._positions[task]:
            name = name if len(name) <= NAME_WIDTH else f"…{name[1 - NAME_WIDTH :]}"
            where = f"{self._place(task, part)} {name}"
        else:
            where = f"{task}: {name}"
        self._bars.update(self._shown[task], advance=amount, description=where)

    def note(self, message: str) -> None:
        self._console.print(printable(message), soft_wrap=True, markup=False)

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
        if part is None:
            self._remove(task)
        elif outcome:
            self.note(f"[{self._place(task, part)}] {part}: {outcome}")

    def close(self) -> None:
        self._bars.stop()

    def _place(self, task: str, part: str) -> str:
        positions = self._positions[task]
        return f"{positions.get(part, 0)}/{len(positions)}"

    def _remove(self, task: str) -> None:
        if task in self._shown:
            self._bars.remove_task(self._shown.pop(task))
