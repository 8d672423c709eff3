"""Makes names from a checkpoint safe for a terminal.

Control characters in a name would be commands to the terminal, and brackets would be commands to rich. `markup` does
the same for HTML, and `markdown` for Markdown and Python.
"""

import io
from typing import TextIO

# Characters with a meaning in rich's markup, and private characters that replace them until rich has parsed the markup.
# rich's own escape() looks for complete tags. It misses those in `[a[/]`, and those that two names form together.
_STAND_INS = {"[": "\ue000", "\\": "\ue001"}
_TO_STAND_INS = str.maketrans(_STAND_INS)
_FROM_STAND_INS = str.maketrans({stand_in: character for character, stand_in in _STAND_INS.items()})


def printable(name: str) -> str:
    """The name with every character that is not printable shown as an escape, such as `\\x1b`."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in name)


def escape(name: str) -> str:
    """The name for rich's markup: printable, and without tags. Only consoles of `terminal` show it correctly."""
    return printable(name).translate(_TO_STAND_INS)


def unescaped(text: str) -> str:
    """Text that rich has parsed, ready to show: printable lines, with the real characters instead of stand-ins."""
    return printable_lines(text.translate(_FROM_STAND_INS))


def printable_lines(text: str) -> str:
    """The text with each line made printable."""
    return "\n".join(map(printable, text.split("\n")))


class PrintableStream(io.TextIOBase):
    """A text stream that makes all lines printable. Used for stderr, where other libraries write names too.

    It has no `buffer`, which would bypass it. Consoles write to `stream` directly, because they need control sequences.
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
