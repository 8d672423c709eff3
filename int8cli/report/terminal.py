"""What all terminal reports share: a console of 80 columns, and the look of a table."""

from rich.console import Console
from rich.table import Table

WIDTH = 80


def stdout_console() -> Console:
    """A console on stdout that never uses more than 80 columns."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH)
    return console


def titled_table(title: str) -> Table:
    """A table without a frame; an empty title means no title."""
    table = Table(title=title or None, title_justify="left", title_style="bold", caption_justify="left", box=None)
    table.padding = (0, 1)
    return table
