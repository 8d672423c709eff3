"""What all reports on the terminal have in common: a console as wide as the terminal, and the look of a table.

Also the last filter before the terminal: only printable characters, newlines and rich's own sequences pass.
"""

import sys
from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from int8cli.report.text import PrintableStream, unescaped

# What a pipe or a file gets is read by programs: no line of it is ever broken.
_UNBROKEN = 1 << 16


class PrintingConsole(Console):
    """A console that shows control characters as escapes, and turns the stand-ins of `text.escape` back into brackets.

    Even text that was not escaped, such as a table cell without markup, is therefore harmless to the terminal.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(unescaped(segment.text), segment.style)

    def print_table(self, table: Table) -> None:
        """Print a table with its title and caption. Where it is wider than the terminal, no cell of a `no_wrap` column
        is cut or broken: the terminal itself breaks the line, and a copied name is whole."""
        title, caption = table.title, table.caption
        table.title = table.caption = None
        for column in table.columns:
            if column.no_wrap:
                column.min_width = _widest(self, column)
        if title:
            self.print(title, style="bold", soft_wrap=True)
        least = table.__rich_measure__(self, self.options.update(max_width=_UNBROKEN)).minimum
        width, self.width = self.width, max(self.width, least)
        try:
            if self.is_terminal:
                self.print(table, crop=False)
            else:
                self._print_lines(table)
        finally:
            self.width = width
        if caption:
            self.print(caption, style="dim italic", soft_wrap=not self.is_terminal)

    def _print_lines(self, table: Table) -> None:
        """Print the rows as lines of text, without the spaces that fill up the last column."""
        for line in self.render_lines(table, pad=False):
            self.out("".join(segment.text for segment in line).rstrip(), highlight=False)


def _widest(console: Console, column: Column) -> int:
    texts = (console.render_str(cell) if isinstance(cell, str) else cell for cell in (column.header, *column.cells))
    lines = (line for text in texts if isinstance(text, Text) for line in text.plain.splitlines())
    return max((cell_len(unescaped(line)) for line in lines), default=0)


def stdout_console() -> PrintingConsole:
    """A console on stdout, as wide as the terminal; elsewhere nothing is wrapped."""
    console = PrintingConsole(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNBROKEN
    return console


def stderr_console() -> PrintingConsole:
    """A console on stderr, as wide as the terminal."""
    stream = sys.stderr.stream if isinstance(sys.stderr, PrintableStream) else sys.stderr
    return PrintingConsole(file=stream, highlight=False, emoji=False)


def titled_table(title: str) -> Table:
    """A table without a frame; an empty title means no title."""
    table = Table(title=title or None, title_justify="left", title_style="bold", caption_justify="left", box=None)
    table.padding = (0, 1)
    return table
