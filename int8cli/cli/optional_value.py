"""An option whose value may be left out. Typer has none: a command of this class completes it before it parses.

Owns when a word after the option is its value.
"""

import re
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from int8cli.cli.empty_values import Command
from int8cli.workers.ray_addresses import AUTO, HERE, LOCAL

_RAY = "--ray"
_ADDRESS = re.compile(rf"{AUTO}|{LOCAL}|{HERE}|ray://.+|.*[^:]:\d+")


class ConvertCommand(Command):
    """`--ray` without an address means HERE."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_completed(args)))


def _completed(args: list[str]) -> Iterator[str]:
    """The arguments with HERE as the value of each `--ray` that an address does not follow."""
    options = True
    for word, following in zip_longest(args, args[1:]):
        options = options and word != "--"
        is_value = following is not None and (not following or _ADDRESS.fullmatch(following) is not None)
        bare = options and word == _RAY and not is_value
        yield f"{_RAY}={HERE}" if bare else word
