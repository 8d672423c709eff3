"""`int8cli report`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from int8cli.cli import hints
from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import ConvertedDirectory, Json, Quiet, check_outputs, say_written

EXAMPLES = """\
int8cli report bloom-int8
int8cli report bloom-int8 -o report.html
int8cli report ./my-model-int8 -o report.html -o report.png
"""

Outputs = Annotated[
    list[Path] | None,
    typer.Option("--output", "-o", help="Write a page (.html) or a picture (.png, .svg). Repeatable.", metavar="FILE"),
]


@shows_errors(hints.REPORT)
def report(
    directory: ConvertedDirectory,
    output: Outputs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the report of a finished conversion: tables here, or a page with charts of every layer.

    The page is one file that loads nothing from elsewhere. Everything comes from int8/report.json: no weight is read.
    """
    outputs = tuple(output or ())
    check_outputs(outputs)
    from int8cli.commands import report as command
    from int8cli.report.conversion import show_report

    found = command.read_report(directory)
    for path in outputs:
        command.write_report(found, path)
        say_written(path, quiet=quiet)
    with writing_result():
        if as_json:
            print(json.dumps(found.to_json(), indent=2))
        elif not quiet and not outputs:
            show_report(found, directory)
