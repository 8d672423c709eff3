"""`int8cli verify`."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int8cli.cli.errors import EXIT_ERROR, shows_errors, writing_result
from int8cli.cli.options import Device, Json, Quiet, complete_path, require_device, usable_cores
from int8cli.errors import OutputError

if TYPE_CHECKING:
    from int8cli.checkpoint.source import Source
    from int8cli.cli.passes import PassObserver
    from int8cli.records.store import Conversion

EXAMPLES = """\
int8cli verify bloom-int8
int8cli verify ./my-model-int8 --source ./my-model
int8cli verify ./name-int8 --source org/name --json > verification.json
"""


@shows_errors
def verify(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="What int8cli convert wrote.", autocompletion=complete_path, show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--source", metavar="MODEL", help="Convert this once more and compare: a Hub id or a directory."),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Of the source on the Hub.", show_default="the one that was converted", metavar="REV"),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to quantize again.")] = Device.cpu,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that a conversion is whole and loads and, with --source, that it is what its source becomes.

    Every byte of every file is held against the digests taken when it was written, and all that speaks of the tensors
    against the tensors. Where transformers is installed the model is laid out, without weights, to see that each int8
    tensor lands on a layer that takes it. Exits with 0 only if nothing fails.
    """
    from int8cli.cli.passes import observe_passes
    from int8cli.planning.blocks import THREADS_FOR_A_SHARD
    from int8cli.report.verification import show_verification
    from int8cli.verify import VerifyOptions, conversion_in
    from int8cli.verify import verify as run

    if revision is not None and model is None:
        raise typer.BadParameter("it is the revision of a --source", param_hint="'--revision'")
    require_device(device)
    conversion = conversion_in(directory)
    options = VerifyOptions(min(THREADS_FOR_A_SHARD, usable_cores()), device.value)
    with observe_passes(quiet=quiet) as observer, _source(model, revision, conversion, directory, observer) as source:
        verification = run(directory, source, options, observer)
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


@contextmanager
def _source(
    model: str | None, revision: str | None, conversion: "Conversion", directory: Path, observer: "PassObserver"
) -> Iterator["Source | None"]:
    """The source to compare with, if one is asked for: on the Hub at the revision that was converted.

    Its shards land where those of convert do, one at a time, and are gone afterwards.
    """
    from int8cli.checkpoint.locate import open_source
    from int8cli.records.store import RecordStore

    if model is None:
        yield None
        return
    converted = conversion.source
    if revision is None and converted.on_hub and converted.name == model:
        revision = converted.revision
    incoming = RecordStore(directory).incoming_directory
    source = open_source(
        model, revision=revision, download_dir=incoming, on_bytes=observer.received, on_wait=observer.waiting
    )
    try:
        yield source
    finally:
        source.close()
        shutil.rmtree(incoming, ignore_errors=True)
