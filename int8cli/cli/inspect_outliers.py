"""`int8cli inspect-outliers`."""

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int8cli.cli import hints
from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import (
    PAGES,
    Device,
    Json,
    Model,
    ModelDevice,
    Quiet,
    RetryFor,
    Revision,
    Scales,
    Seed,
    SequenceLength,
    TextFile,
    Tokens,
    WorkDir,
    check_outputs,
    options_of,
    say_written,
)
from int8cli.commands.options import RETRY_FOR_S, InspectOptions

if TYPE_CHECKING:
    from int8cli.outliers.statistics import OutlierStatistics
    from int8cli.outliers.suspects import WeightSuspects

EXAMPLES = """\
int8cli inspect-outliers bigscience/bloom-560m
int8cli inspect-outliers ./my-model --text corpus.txt -o report.html -o outliers.safetensors
int8cli inspect-outliers org/name --from weights --json > suspects.json
"""
_SUFFIXES = (*PAGES, ".safetensors")


class Evidence(enum.StrEnum):
    """What the result is based on."""

    activations = "activations"
    weights = "weights"


From = Annotated[
    Evidence | None,
    typer.Option(
        "--from",
        help="Run the model, or guess from its weights.",
        show_default="activations if the model can be run",
    ),
]

Threshold = Annotated[float, typer.Option(help="Values of this magnitude or more are outliers.", min=0.0)]

Outputs = Annotated[
    list[Path] | None,
    typer.Option(
        "--output",
        "-o",
        help="Write a report (.html, .png, .svg) or statistics for convert (.safetensors). Repeatable.",
        metavar="FILE",
    ),
]


Smooth = Annotated[
    Scales | None,
    typer.Option(
        "--smooth",
        metavar="[exact|fine]",
        help="Also find and prove what convert --smooth FILE can smooth: by powers of two (exact, the default of this "
        "option), or in steps of 2^(1/4) (fine). Takes longer.",
        show_default="nothing",
    ),
]


@shows_errors(hints.INSPECT_OUTLIERS, resumes=True)
def inspect_outliers(
    model: Model,
    evidence: From = None,
    revision: Revision = None,
    text: TextFile = None,
    tokens: Tokens = 4096,
    sequence_length: SequenceLength = 512,
    seed: Seed = 0,
    threshold: Threshold = 6.0,
    smooth: Smooth = None,
    device: ModelDevice = Device.cpu,
    output: Outputs = None,
    work_dir: WorkDir = None,
    retry_for: RetryFor = RETRY_FOR_S,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the feature dimensions that carry outliers, layer by layer, by running the model.

    One block is in memory at a time, and each weight is read once, straight from the checkpoint. An interrupted run
    resumes after its last finished block. With --from weights, the result is only a guess.
    """
    outputs = tuple(output or ())
    check_outputs(outputs, _SUFFIXES)
    if evidence is Evidence.weights and any(path.suffix not in PAGES for path in outputs):
        raise typer.BadParameter("statistics need activations, not --from weights", param_hint="'--output'")
    from int8cli.cli.progress import shown_progress
    from int8cli.commands import inspect_outliers as command

    options = options_of(InspectOptions, locals())
    with shown_progress(quiet=quiet) as progress:
        found = command.inspect_outliers(model, options, progress=progress)
    for path in outputs:
        write(found, path)
        say_written(path, quiet=quiet)
    with writing_result():
        show(found, as_json=as_json, quiet=quiet)


def write(found: "OutlierStatistics | WeightSuspects", path: Path) -> None:
    """Write a page, a picture or a statistics file, depending on the suffix. Raises OutputError."""
    from int8cli.errors import OutputError
    from int8cli.outliers.statistics import OutlierStatistics
    from int8cli.outliers.statistics_file import save_statistics
    from int8cli.report.outlier_charts import write_picture
    from int8cli.report.outlier_page import write_page

    if path.suffix == ".html":
        write_page(found, path)
    elif path.suffix != ".safetensors":
        write_picture(found, path)
    elif isinstance(found, OutlierStatistics):
        save_statistics(found, path)
    else:
        raise OutputError(
            f"{path} was not written: statistics need activations, and the model was not run",
            hint="pip install 'int8cli[calibrate]', or leave this output out.",
        )


def show(found: "OutlierStatistics | WeightSuspects", *, as_json: bool, quiet: bool) -> None:
    from int8cli.outliers.statistics import OutlierStatistics
    from int8cli.report.outliers import show_statistics, show_suspects
    from int8cli.report.outliers_json import statistics_to_json, suspects_to_json

    if isinstance(found, OutlierStatistics):
        if as_json:
            print(json.dumps(statistics_to_json(found), indent=2))
        elif not quiet:
            show_statistics(found)
    elif as_json:
        print(json.dumps(suspects_to_json(found), indent=2))
    elif not quiet:
        show_suspects(found)
