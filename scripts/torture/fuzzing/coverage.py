"""Which steps from line to line of int8cli an input takes.

Owns the tracing of this process, of all its threads.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import int8cli

_PACKAGE = str(Path(int8cli.__file__).parent)


class Coverage:
    """The steps that were taken so far."""

    def __init__(self) -> None:
        self._steps: set[tuple[int, int, int]] = set()
        self._last = 0

    def __len__(self) -> int:
        return len(self._steps)

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Take down the steps of what runs in this context."""
        self._last = 0
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            line = frame.f_lineno
            self._steps.add((hash(frame.f_code), self._last, line))
            self._last = line
        return self._line
