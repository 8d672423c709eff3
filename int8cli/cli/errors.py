"""The one place where an exception becomes text and an exit code."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from int8cli.errors import Int8cliError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def shows_errors(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Give a command its exit codes: what a user can act on is shown as error and hint; bugs keep their traceback."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except Int8cliError as error:
            show_error(error)
            raise typer.Exit(EXIT_ERROR) from None
        except KeyboardInterrupt:
            print("\ninterrupted: run the same command again to go on", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of stdout went away (`| head`); point it elsewhere so that nothing complains at exit.
            sys.stdout = None
            raise typer.Exit(EXIT_ERROR) from None

    return run


def show_error(error: Int8cliError) -> None:
    print(f"error: {error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
