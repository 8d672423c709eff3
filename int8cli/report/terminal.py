"""What all reports on the terminal share: a console of 80 columns, and the look of a table.

Also the last filter before the terminal: only printable characters, newlines and rich's own sequences pass.
"""

import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from int8cli.report.text import PrintableStream, unescaped

WIDTH = 80


class PrintingConsole(Console):
    """A console that shows control characters as escapes, and turns the stand-ins of `text.escape` back into brackets.

    Even text that was not escaped, such as a table cell without markup, is therefore harmless to the terminal.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(unescaped(segment.text), segment.style)


def stdout_console() -> Console:
    """A console on stdout that never uses more than 80 columns."""
    console = PrintingConsole(highlight=False, emoji=False)
    console.width = min(console.width, WIDTH)
    return console


def stderr_console() -> Console:
    """A console on stderr, as wide as the terminal."""
    stream = sys.stderr.stream if isinstance(sys.stderr, PrintableStream) else sys.stderr
    return PrintingConsole(file=stream, highlight=False, emoji=False)


def titled_table(title: str) -> Table:
    """A table without a frame; an empty title means no title."""
    table = Table(title=title or None, title_justify="left", title_style="bold", caption_justify="left", box=None)
    table.padding = (0, 1)
    return table
