"""Options whose value may be left out. Typer has none: a command of these classes completes it before it parses.

Owns when a word after such an option is its value.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

from int8cli.cli.empty_values import Command
from int8cli.workers.ray_addresses import AUTO, HERE, LOCAL


@dataclass(frozen=True, slots=True)
class OptionalValue:
    """An option, the value that it has without one, and what the values after it look like."""

    option: str
    default: str
    value: re.Pattern[str]

    def completed(self, args: Sequence[str]) -> Iterator[str]:
        """The arguments with the default after each such option that no value follows. Nothing after -- is one."""
        options = True
        for word, following in zip_longest(args, args[1:]):
            options = options and word != "--"
            is_value = following is not None and (not following or self.value.fullmatch(following) is not None)
            bare = options and word == self.option and not is_value
            yield f"{self.option}={self.default}" if bare else word


RAY = OptionalValue("--ray", HERE, re.compile(rf"{AUTO}|{LOCAL}|{HERE}|ray://.+|.*[^:]:\d+"))
SMOOTH = OptionalValue("--smooth", "exact", re.compile("exact|fine"))


class _WithOptionalValue(Command):
    optional: ClassVar[OptionalValue]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self.optional.completed(args)))


class ConvertCommand(_WithOptionalValue):
    """`--ray` without an address means HERE."""

    optional = RAY


class InspectCommand(_WithOptionalValue):
    """`--smooth` alone means powers of two."""

    optional = SMOOTH
