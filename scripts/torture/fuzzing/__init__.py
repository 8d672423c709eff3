"""A fuzzer for every format that int8cli reads: which inputs are tried, and what may come of one.

An input is bytes. What reads it may succeed or raise a child of Int8cliError, within bounds of time and memory; all
else is a fault. Inputs that reach lines of int8cli which none before them reached are kept and changed further.
atheris would do this part too; it has no wheel for macOS nor for the newest Python, takes over its process, and is
35 MB, where this is two small modules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

Run = Callable[[bytes], None]
Mutate = Callable[[Random, bytes, bytes], bytes]


class WrongResultError(Exception):
    """What was read is not what the format's own reader reads; the message says how they differ."""


@dataclass(frozen=True, slots=True)
class Target:
    """A format and its reader.

    `prepare` makes what is needed in a scratch directory, and returns valid inputs and the function that reads one:
    it may return, raise Int8cliError, or raise WrongResultError. `mutate` makes an input from one and another.
    """

    name: str
    prepare: Callable[[Path], tuple[list[bytes], Run]]
    mutate: Mutate
