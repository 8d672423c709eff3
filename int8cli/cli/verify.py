"""`int8cli verify`."""

import json
from typing import Annotated

import typer

from int8cli.cli import hints
from int8cli.cli.errors import EXIT_ERROR, shows_errors, writing_result
from int8cli.cli.options import ConvertedDirectory, Device, Json, Quiet, RetryFor, options_of
from int8cli.commands.options import RETRY_FOR_S, VerifyOptions
from int8cli.errors import OutputError

EXAMPLES = """\
int8cli verify bloom-int8
int8cli verify ./my-model-int8 --source ./my-model
int8cli verify ./name-int8 --source org/name --json > verification.json
"""

SourceModel = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="MODEL",
        help="Convert this model again and compare: a Hub id, a directory, a file or an address.",
    ),
]
SourceRevision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the source.", show_default="the one that was converted", metavar="REV"),
]
Where = Annotated[Device, typer.Option(help="Device to quantize on, with --source.")]


@shows_errors(hints.VERIFY)
def verify(
    directory: ConvertedDirectory,
    source: SourceModel = None,
    revision: SourceRevision = None,
    device: Where = Device.cpu,
    retry_for: RetryFor = RETRY_FOR_S,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that a conversion is complete and loads and, with --source, that it matches its source.

    Compares every byte of every file with the digests taken when it was written, and the index, the records, the report
    and config.json with the tensors. If transformers is installed, builds the model without weights to check that every
    int8 tensor has a layer that accepts it. The exit code is 0 only if no check fails.
    """
    from int8cli.cli.progress import shown_progress
    from int8cli.commands import verify as command
    from int8cli.report.verification import show_verification

    options = options_of(VerifyOptions, locals())
    with shown_progress(quiet=quiet) as progress:
        verification = command.verify(directory, options, progress=progress)
    with writing_result():
        if as_json:
            print(json.dumps(verification.to_json(), indent=2))
        elif not quiet:
            show_verification(verification)
    if not verification.passed:
        if quiet and not as_json:
            failed = ", ".join(check.name for check in verification.checks if check.status == "failed")
            raise OutputError(f"{directory} failed: {failed}", hint="Run without --quiet to see every failure.")
        raise typer.Exit(EXIT_ERROR)
