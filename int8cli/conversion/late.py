"""What another machine has written, and a file system of a network shows late.

Owns how that is noticed, and how long it is waited for. Knows no file by its meaning.
"""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# How long such a file system may go on with what it knew: of a directory, or of a machine that is gone.
LATE_S = 90.0
LOOK_AGAIN_S = 0.2


def comes_true(condition: Callable[[], bool]) -> bool:
    """Wait until a condition is true. False if it is not after `LATE_S`."""
    deadline_s = time.monotonic() + LATE_S
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(LOOK_AGAIN_S)
    return True


def shown_late(paths: Iterable[Path]) -> bool:
    """Whether a directory lists one of these files, and the file cannot be found by its name yet."""
    listed: dict[Path, frozenset[str]] = {}
    for path in paths:
        if path.parent not in listed:
            listed[path.parent] = _names_in(path.parent)
        if path.name in listed[path.parent] and not os.path.lexists(path):
            return True
    return False


def _names_in(directory: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
