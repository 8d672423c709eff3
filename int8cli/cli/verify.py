"""`int8cli verify`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from int8cli.cli import hints
from int8cli.cli.errors import EXIT_ERROR, shows_errors, writing_result
from int8cli.cli.options import Device, Json, Quiet, complete_path
from int8cli.commands.options import VerifyOptions
from int8cli.errors import OutputError

EXAMPLES = """\
int8cli verify bloom-int8
int8cli verify ./my-model-int8 --source ./my-model
int8cli verify ./name-int8 --source org/name --json > verification.json
"""

Directory = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="What int8cli convert wrote.", autocompletion=complete_path, show_default=False),
]
SourceModel = Annotated[
    str | None,
    typer.Option("--source", metavar="MODEL", help="Convert this once more and compare: a Hub id or a directory."),
]
SourceRevision = Annotated[
    str | None,
    typer.Option(help="Of the source on the Hub.", show_default="the one that was converted", metavar="REV"),
]
Where = Annotated[Device, typer.Option(help="Where to quantize again.")]


@shows_errors(hints.VERIFY)
def verify(
    directory: Directory,
    source: SourceModel = None,
    revision: SourceRevision = None,
    device: Where = Device.cpu,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that a conversion is whole and loads and, with --source, that it is what its source becomes.

    Every byte of every file is held against the digests taken when it was written, and all that speaks of the tensors
    against the tensors. Where transformers is installed the model is laid out, without weights, to see that each int8
    tensor lands on a layer that takes it. Exits with 0 only if nothing fails.
    """
    from int8cli.cli.progress import shown_progress
    from int8cli.commands import verify as command
    from int8cli.report.verification import show_verification

    options = VerifyOptions(source, revision, device.value)
    with shown_progress(quiet=quiet) as progress:
        verification = command.verify(directory, options, progress=progress)
    with writing_result():
        if as_json:
            print(json.dumps(verification.to_json(), indent=2))
        elif not quiet:
            show_verification(verification)
    if not verification.holds:
        if quiet and not as_json:
            failed = ", ".join(check.name for check in verification.checks if check.status == "failed")
            raise OutputError(f"{directory} does not hold: {failed}", hint="Without --quiet, each failure is named.")
        raise typer.Exit(EXIT_ERROR)
