"""Names that come from a checkpoint, made safe for a terminal.

Owns what of them may be shown: a name is data, but its control characters would be commands to the terminal, and its
brackets commands to rich. `markup` makes text safe for HTML, `markdown` for Markdown and Python.
"""

import io
from typing import TextIO

# What rich's markup reads as its own, and the private characters that stand for it until rich has read the markup.
# rich's own escape() looks for whole tags, and misses those in `[a[/]` and those that two names make together.
_STAND_INS = {"[": "\ue000", "\\": "\ue001"}
_TO_STAND_INS = str.maketrans(_STAND_INS)
_FROM_STAND_INS = str.maketrans({stand_in: character for character, stand_in in _STAND_INS.items()})


def printable(name: str) -> str:
    """The name with everything that is no printable character written out, as in `\\x1b`."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in name)


def escape(name: str) -> str:
    """The name for rich's markup: printable, and no part of it is a tag. To be shown by a console of `terminal`."""
    return printable(name).translate(_TO_STAND_INS)


def unescaped(text: str) -> str:
    """What a console shows of text that rich has read: printable lines, with the characters that were stood in for."""
    return printable_lines(text.translate(_FROM_STAND_INS))


def printable_lines(text: str) -> str:
    """The text with every line made printable."""
    return "\n".join(map(printable, text.split("\n")))


class PrintableStream(io.TextIOBase):
    """A text stream that only takes printable lines: for stderr, where other libraries write names too.

    It has no `buffer`, which would be a way around it. `stream` is for a console, whose sequences are its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.stream.errors

    def write(self, text: str, /) -> int:
        self.stream.write(printable_lines(text))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def writable(self) -> bool:
        return True
