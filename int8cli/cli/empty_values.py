"""Refuses an empty value, such as that of an unset variable in `-o "$OUTPUT"`, for every command.

An empty path would be the current directory, and an empty list the default.
"""

from typing import Any

import typer
from typer.core import TyperCommand

# A text, which may be empty.
_MAY_BE_EMPTY = frozenset({"prompt"})


class Command(TyperCommand):
    """A command that refuses empty values before any value is converted."""

    # typer's releases have their click in different places, and with it the type of a context.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises typer.BadParameter, which names the option or argument."""
        if ctx.resilient_parsing:  # the shell completes what is not whole yet
            return super().parse_args(ctx, args)
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        parameter: Any
        for parameter in self.get_params(ctx):
            value = given.get(parameter.name)
            values = value if isinstance(value, (list, tuple)) else (value,)
            if "" in values and parameter.name not in _MAY_BE_EMPTY:
                raise typer.BadParameter("it is empty", ctx=ctx, param=parameter)
        return super().parse_args(ctx, args)
