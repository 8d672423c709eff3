"""The standard streams of the program, made ready for everything they can be: closed, full, or a pipe without a reader.

Owns what happens where a message cannot be written. A result that cannot be written is an error: see `errors`.
"""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO, cast

from int8cli.report.text import PrintableStream

_MODES = {0: os.O_RDONLY, 1: os.O_RDONLY, 2: os.O_WRONLY}  # writing to a closed stdout fails, as it should


def prepare_streams() -> None:
    """Make the standard streams safe to use. Called once, before anything is opened or printed."""
    _fill_closed_descriptors()
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # for the rest of the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack × or characters of file names
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = PrintableStream(cast(TextIO, MessageStream(sys.stderr)))


class MessageStream(io.TextIOBase):
    """A text stream that drops what cannot be written: no work stops because its messages have nowhere to go.

    It has no `buffer`, which would bypass it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True


def _fill_closed_descriptors() -> None:
    """Open the null device in place of each standard descriptor that is closed.

    Otherwise the next file that is opened gets its number, and what a library writes to stderr goes into that file.
    """
    for descriptor, mode in _MODES.items():
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)
