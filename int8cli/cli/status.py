"""`int8cli status`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from int8cli.cli import hints
from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import Json, complete_path

EXAMPLES = """\
int8cli status bloom-int8
int8cli status ./my-model-int8 --json
"""

Directory = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="A directory that int8cli convert writes.",
        autocompletion=complete_path,
        show_default=False,
    ),
]


@shows_errors(hints.STATUS)
def status(directory: Directory, as_json: Json = False) -> None:
    """Show how much of a conversion is finished: shards, blocks that were run, downloads, and what to do next.

    Can be used while the conversion runs. The exit code is 0 whether or not it is finished.
    """
    from int8cli.commands import status as command
    from int8cli.report.status import show_status

    found = command.status(directory)
    with writing_result():
        if as_json:
            print(json.dumps(found.to_json(), indent=2))
        else:
            show_status(found)
