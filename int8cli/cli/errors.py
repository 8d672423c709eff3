"""The one place where an exception becomes text and an exit code."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import typer

from int8cli.errors import Int8cliError, OutputError

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
        except BrokenPipeError:  # the reader of stdout went away (`| head`)
            _forget_stdout()
            raise typer.Exit(EXIT_ERROR) from None

    return run


@contextmanager
def writing_result() -> Iterator[None]:
    """Write to stdout, to its end, while a failure can still be told; at exit Python would report it in its own way."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget_stdout()
        raise OutputError(f"the result cannot be written to standard output: {error.strerror}") from error


def _forget_stdout() -> None:
    """Keep what is left in the buffer from being written, and failing, once more at exit."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process


def show_error(error: Int8cliError) -> None:
    from int8cli.report.text import printable

    print(f"error: {printable(str(error))}", file=sys.stderr)
    if error.hint:
        print(f"hint: {printable(error.hint)}", file=sys.stderr)
