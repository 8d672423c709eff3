"""The one place where an exception becomes text and an exit code."""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import typer

from int8cli.checkpoint.disk import is_panic, system_errors
from int8cli.cli.signals import EndedBySignal, announce_resuming, name_of, print_interruption, received_signal
from int8cli.errors import Int8cliError, OptionError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
# A hint that names options of a command, by the class of the error.
Hints = Mapping[type[Int8cliError], str]


class ResultNotShownError(Int8cliError):
    """The result cannot be written to standard output."""

    usual_hint = "Check what standard output leads to."


def shows_errors(
    hints: Hints, *, resumes: bool = False
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Give a command its exit codes. Errors that a user can fix are shown with a hint; bugs keep their traceback.

    `resumes`: run again, the command continues where it was interrupted.
    """

    def decorate(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(command)
        def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            if resumes:
                announce_resuming()
            try:
                return command(*args, **kwargs)
            except OptionError as error:
                hint = hint_for(error, hints)
                message = f"{error}. {hint}" if hint else str(error)
                raise typer.BadParameter(message, param_hint=f"'{flag_of(error.option)}'") from None
            except Int8cliError as error:
                show_error(error, hint_for(error, hints))
                raise typer.Exit(EXIT_ERROR) from None
            except KeyboardInterrupt as interruption:
                raise typer.Exit(_interrupted(interruption)) from None
            except BrokenPipeError:  # the reader of stdout went away (`| head`)
                _forget_stdout()
                raise typer.Exit(_ended_by(EXIT_ERROR)) from None
            except (OSError, MemoryError, ImportError, RuntimeError) as error:  # raised outside the library functions
                refusal = _refusal(error)
                show_error(refusal, hint_for(refusal, hints))
                raise typer.Exit(_ended_by(EXIT_ERROR)) from None
            except BaseException as error:
                if not is_panic(error):
                    raise
                refusal = _refusal(error)
                show_error(refusal, hint_for(refusal, hints))
                raise typer.Exit(_ended_by(EXIT_ERROR)) from None

        return run

    return decorate


@contextmanager
def interruptions() -> Iterator[None]:
    """End the program as in a command where a signal arrives outside of one: while options are parsed, for example.

    Typer gives every interrupt there the exit code 130, and prints nothing.
    """
    try:
        yield
    except KeyboardInterrupt as interruption:
        raise SystemExit(_interrupted(interruption)) from None
    except SystemExit as end:
        if end.code != EXIT_INTERRUPTED:
            raise
        number = received_signal()
        raise SystemExit(_interrupted(KeyboardInterrupt() if number is None else EndedBySignal(number))) from None


@contextmanager
def errors_outside_commands() -> Iterator[None]:
    """Show errors of the system where no command runs: help that cannot be written, for example."""
    try:
        with writing_result():
            yield
    except BrokenPipeError:
        _forget_stdout()
        raise SystemExit(_ended_by(EXIT_ERROR)) from None
    except Int8cliError as error:
        show_error(error, error.hint)
        raise SystemExit(_ended_by(EXIT_ERROR)) from None
    except (ImportError, MemoryError) as error:  # while options are parsed: too little memory for the parser's modules
        refusal = _refusal(error)
        show_error(refusal, refusal.hint)
        raise SystemExit(_ended_by(EXIT_ERROR)) from None


@contextmanager
def writing_result() -> Iterator[None]:
    """Write to stdout and flush it, so that a failure is reported here and not by Python at exit."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget_stdout()
        raise ResultNotShownError(f"the result cannot be written to standard output: {error.strerror}") from error


def _interrupted(interruption: KeyboardInterrupt) -> int:
    """Print what ended the program. Returns its exit code."""
    print_interruption(name_of(interruption))
    return _ended_by(EXIT_INTERRUPTED)


def _ended_by(otherwise: int) -> int:
    """The exit code: that of the signal, if there was one, even if another error occurred while the program ended."""
    number = received_signal()
    return otherwise if number is None else 128 + number


def _refusal(error: BaseException) -> Int8cliError:
    try:
        with system_errors():
            raise error
    except Int8cliError as refusal:
        return refusal


def hint_for(error: Int8cliError, hints: Hints) -> str:
    """The error's own hint, followed by the command's hint for the nearest class of the error."""
    own = next((hints[kind] for kind in type(error).__mro__ if kind in hints), "")
    return f"{error.hint} {own}".strip()


def flag_of(option: str) -> str:
    """The command-line flag of a library option."""
    return f"--{option.replace('_', '-')}"


def _forget_stdout() -> None:
    """Discard what is in the buffer of stdout. Otherwise Python would write it at exit and fail again."""
    try:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for the rest of the process
    except OSError:  # no descriptor is left
        sys.stdout = None  # as Python has it where the descriptor is closed


def show_error(error: Int8cliError, hint: str) -> None:
    from int8cli.report.text import printable

    print(f"error: {printable(str(error))}", file=sys.stderr)
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr)
