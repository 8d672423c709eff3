"""Records the output of a command line by line, and renders the recording as an SVG that plays once."""

import io
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from rich import _export_format
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

WIDTH = 100
MOST_LINES = 32
PLAYS_S = 9.0
OMITTED = "…"
PROGRESS = re.compile(r"^block \d+/\d+ ")
THEME = TerminalTheme(
    (22, 27, 34),
    (230, 237, 243),
    [
        (72, 79, 88),
        (255, 123, 114),
        (63, 185, 80),
        (210, 153, 34),
        (88, 166, 255),
        (188, 140, 255),
        (57, 197, 207),
        (177, 186, 196),
    ],
    [
        (110, 118, 129),
        (255, 161, 152),
        (86, 211, 100),
        (227, 179, 65),
        (121, 192, 255),
        (210, 168, 255),
        (86, 212, 221),
        (240, 246, 252),
    ],
)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of output with its colors as ANSI sequences, and its time in seconds from the start."""

    text: str
    seconds: float


def record(command: Sequence[str], directory: Path, limit_s: float) -> list[Line]:
    """Run a command and record its output with the time of each line. Raises CalledProcessError."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(limit_s, process.kill)
        watchdog.start()
        lines = [Line(text.rstrip("\n"), time.monotonic() - started) for text in process.stdout]
        watchdog.cancel()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return lines


def to_svg(command: str, lines: Sequence[Line]) -> str:
    """The recording as an SVG. Lines appear at their original pace, scaled to at most PLAYS_S seconds.

    Viewers without animation show the last state. The SVG fetches no font.
    """
    shown = list(_shortened([Line(f"\x1b[1m$ {command}\x1b[0m", 0.0), *lines]))
    console = Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor", legacy_windows=False)
    rows = []
    for line in shown:
        wrapped = Text.from_ansi(line.text).wrap(console, WIDTH)
        rows += [line.seconds] * max(1, len(wrapped))
        console.print(Text.from_ansi(line.text))
    svg = console.export_svg(title="", theme=THEME, code_format=_format(), unique_id="recording")
    return _animated(svg, rows)


def _shortened(lines: Sequence[Line]) -> Iterator[Line]:
    """The lines, with each run of progress lines reduced to the first and last, and cut at MOST_LINES."""
    found: list[Line] = []
    for progress, run in groupby(lines, lambda line: bool(PROGRESS.match(line.text))):
        group = list(run)
        if progress and len(group) > 3:
            group = [group[0], replace(group[1], text=OMITTED), group[-1]]
        found += group
    yield from found[:MOST_LINES]
    if len(found) > MOST_LINES:
        yield replace(found[MOST_LINES], text=OMITTED)


def _format() -> str:
    """rich's format for SVG, without the fonts that it would fetch."""
    without_fonts = re.sub(r"@font-face \{\{.*?\}\}", "", _export_format.CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return without_fonts.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace")


def _animated(svg: str, rows: Sequence[float]) -> str:
    """Make each row of the terminal appear at its time. `rows` are the times in seconds."""
    pace = PLAYS_S / max(rows[-1], PLAYS_S)
    rules = [
        f'[clip-path$="line-{row})"] {{ animation: appear 0.01s {seconds * pace:.2f}s backwards }}'
        for row, seconds in enumerate(rows)
        if seconds
    ]
    style = "\n".join(
        [
            "@keyframes appear { from { visibility: hidden } }",
            "@media (prefers-reduced-motion: no-preference) {",
            *rules,
            "}",
        ]
    )
    return svg.replace("</style>", f"{style}\n</style>", 1)
