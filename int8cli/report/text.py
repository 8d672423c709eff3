"""Makes names from a checkpoint safe to show on a terminal or a page.

Owns what may be shown: a name is data, and its control characters would be commands to the terminal.
"""

from collections.abc import Iterator

from rich.markup import escape


def printable(name: str) -> str:
    """The name with every unprintable character written out, as in `\\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in name)


def broken_at_dots(name: str, width: int) -> str:
    """The name as rich markup, in lines of at most `width` characters, broken after a dot if possible."""
    return "\n".join(escape(line) for line in _lines(printable(name), width))


def _lines(name: str, width: int) -> Iterator[str]:
    while len(name) > width:
        cut = name.rfind(".", 1, width) + 1 or width
        yield name[:cut]
        name = name[cut:]
    yield name
