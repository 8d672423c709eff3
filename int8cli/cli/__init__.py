"""The command line: parses, calls one library function, renders. Only this package uses typer and exit codes.

A command imports what it needs when it runs, so that `--help` and `--version` are fast. To add a command, add a module
here and a line below. The docstring of a command is its help.
"""

import inspect
from collections.abc import Callable
from typing import Annotated

import typer

from int8cli import __version__
from int8cli.cli import (
    convert,
    dequantize,
    env,
    estimate_memory,
    evaluate,
    generate,
    inspect_outliers,
    push,
    report,
    status,
    verify,
)
from int8cli.cli.empty_values import Command
from int8cli.cli.errors import errors_outside_commands, interruptions
from int8cli.cli.optional_value import ConvertCommand, InspectCommand
from int8cli.cli.signals import end_on_signals
from int8cli.cli.streams import prepare_streams

app = typer.Typer(
    name="int8cli",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # panels cost 0.1 s of CPU time, half of what --help may take
    context_settings={
        "help_option_names": ["-h", "--help"],
        # For a flag without a default, typer imports pydantic, which takes 0.08 s.
        "default_map": {"help": False, "install_completion": False, "show_completion": False},
    },
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"int8cli {__version__}")
        raise typer.Exit


@app.callback()
def int8cli(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Convert 16- and 32-bit transformer checkpoints to LLM.int8(), and measure what the conversion changed.

    Shards are streamed: no tensor and no shard is ever completely in memory. An interrupted run resumes where it
    stopped.
    """


def _add(
    name: str,
    command: Callable[..., None],
    examples: str,
    more: str = "",
    kind: type[Command] = Command,
) -> None:
    """Add a command whose help is its docstring, as paragraphs: the help screen wraps the lines itself.

    `more` is a list that follows the examples.
    """
    paragraphs = [" ".join(text.split()) for text in inspect.cleandoc(command.__doc__ or "").split("\n\n")]
    app.command(
        name,
        help="\n\n".join(paragraphs),
        short_help=paragraphs[0],
        cls=kind,
        epilog=f"Examples:\n\n\b\n{examples}" + (f"\n{more}" if more else ""),  # \b: do not wrap these lines
    )(command)


_add("convert", convert.convert, convert.EXAMPLES, kind=ConvertCommand)
_add("estimate-memory", estimate_memory.estimate_memory, estimate_memory.EXAMPLES)
_add("inspect-outliers", inspect_outliers.inspect_outliers, inspect_outliers.EXAMPLES, kind=InspectCommand)
_add("verify", verify.verify, verify.EXAMPLES)
_add("evaluate", evaluate.evaluate, evaluate.EXAMPLES, evaluate.METHODS_HELP)
_add("generate", generate.generate, generate.EXAMPLES)
_add("dequantize", dequantize.dequantize, dequantize.EXAMPLES)
_add("push", push.push, push.EXAMPLES)
_add("report", report.report, report.EXAMPLES)
_add("status", status.status, status.EXAMPLES)
_add("env", env.env, env.EXAMPLES)


def main() -> None:
    """Entry point of the `int8cli` program."""
    with interruptions():
        prepare_streams()
        end_on_signals()
        with errors_outside_commands():
            app()
