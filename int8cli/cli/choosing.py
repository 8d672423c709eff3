"""The question that `convert` asks before it runs a model for long without having been asked to.

On a terminal somebody answers; elsewhere a line says how to have it shorter.
"""

import sys
from collections.abc import Sequence

import typer

from int8cli.estimate.ways import Way
from int8cli.report.terminal import stderr_console
from int8cli.report.text import printable
from int8cli.report.ways import time_of, ways_table


def choose_way(ways: Sequence[Way]) -> Way:
    """The way to take; the first is what `auto` means."""
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        return _asked(ways)
    shorter = ", ".join(f"--outliers {way.outliers} {time_of(way)}" for way in ways[1:])
    note = f"Choosing outlier columns by running the model takes {time_of(ways[0])} here: {shorter}."
    print(printable(note), file=sys.stderr)
    return ways[0]


def _asked(ways: Sequence[Way]) -> Way:
    stderr_console().print_table(ways_table(ways, "Running the model takes long here"))
    names = [way.outliers for way in ways]
    while True:
        answer = typer.prompt(f"Choose outlier columns by ({', '.join(names)})", default=names[0], err=True)
        matching = [way for way in ways if answer and way.outliers.startswith(str(answer).strip().lower())]
        if len(matching) == 1:
            return matching[0]
