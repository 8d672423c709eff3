"""Names that come from a checkpoint, made fit for a terminal or a page.

Owns what of them may be shown: a name is data, its control characters would be orders to the terminal.
"""

from collections.abc import Iterator

from rich.markup import escape


def printable(name: str) -> str:
    """The name with everything that is no printable character written out, as in `\\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in name)


def broken_at_dots(name: str, width: int) -> str:
    """The name as rich markup, in lines of at most `width` characters that end at a dot wherever one is in reach."""
    return "\n".join(escape(line) for line in _lines(printable(name), width))


def _lines(name: str, width: int) -> Iterator[str]:
    while len(name) > width:
        cut = name.rfind(".", 1, width) + 1 or width
        yield name[:cut]
        name = name[cut:]
    yield name
