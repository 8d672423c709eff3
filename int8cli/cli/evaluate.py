"""`int8cli evaluate`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int8cli.cli import hints
from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import (
    Device,
    Json,
    Model,
    ModelDevice,
    OutlierColumns,
    Quiet,
    RetryFor,
    Revision,
    Scales,
    Seed,
    SequenceLength,
    TextFile,
    WorkDir,
    check_outputs,
    options_of,
    say_written,
)
from int8cli.commands.options import RETRY_FOR_S, EvaluateOptions
from int8cli.results.method_names import ALL, METHOD_KEYS, METHOD_NAMES

if TYPE_CHECKING:
    from int8cli.results.evaluation import Evaluation

EXAMPLES = """\
int8cli evaluate bigscience/bloom-560m
int8cli evaluate ./my-model --text corpus.txt --tokens 16384 -o report.html
int8cli evaluate ./my-model --methods vector-wise,llm-int8-stored --json
int8cli evaluate ./my-model-int8 --source ./my-model
"""
METHODS_HELP = "Methods:\n\n\b\n" + "\n".join(
    f"{'*' if method.by_default else ' '} {method.key:25}  {method.label}" for method in METHOD_NAMES
)

Tokens = Annotated[int, typer.Option(help="Tokens to run, in total.", min=2)]


def complete_methods(incomplete: str) -> Iterator[str]:
    """Names of methods; after a comma the next one."""
    before, comma, typed = incomplete.rpartition(",")
    yield from (f"{before}{comma}{key}" for key in (*METHOD_KEYS, ALL) if key.startswith(typed))


Methods = Annotated[
    list[str] | None,
    typer.Option(
        help="Methods to compare, separated by commas; `all` is every one. The list is below. Repeatable.",
        show_default="those marked *",
        metavar="NAMES",
        autocompletion=complete_methods,
    ),
]

Outliers = Annotated[
    Path | None,
    typer.Option(
        help="Statistics file of inspect-outliers that chooses the columns and, made with --smooth, what to smooth.",
        show_default="calibrate on another text",
        metavar="FILE",
    ),
]

Smooth = Annotated[
    Scales | None,
    typer.Option(
        help="Scales of the smoothed methods: powers of two, or steps of 2^(1/4), which round norms (fine).",
        show_default="as FILE of --outliers, or exact",
    ),
]
SourceModel = Annotated[
    str | None,
    typer.Option(
        "--source", help="For a converted MODEL: the 16-bit model it was made from, to compare with.", metavar="MODEL"
    ),
]

Outputs = Annotated[
    list[Path] | None,
    typer.Option("--output", "-o", help="Write a report: .html, .png or .svg. Repeatable.", metavar="FILE"),
]


@shows_errors(hints.EVALUATE, resumes=True)
def evaluate(
    model: Model,
    text: TextFile = None,
    tokens: Tokens = 4096,
    sequence_length: SequenceLength = 512,
    seed: Seed = 0,
    methods: Methods = None,
    outlier_columns: OutlierColumns = None,
    outliers: Outliers = None,
    smooth: Smooth = None,
    source: SourceModel = None,
    revision: Revision = None,
    device: ModelDevice = Device.cpu,
    output: Outputs = None,
    work_dir: WorkDir = None,
    retry_for: RetryFor = RETRY_FOR_S,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare int8 methods on a model: perplexity and divergence against 16 bit, and the output error of every layer.

    All methods share one pass over the weights, with one block in memory. A calibration on another text, one more pass,
    chooses the stored columns. For a model that convert wrote, its own int8 tensors are evaluated; --source compares
    them with the 16-bit model. Encoders get output errors only. An interrupted run resumes after its last finished
    block.
    """
    outputs = tuple(output or ())
    check_outputs(outputs)
    from int8cli.cli.progress import shown_progress
    from int8cli.commands import evaluate as command

    named = tuple(name.strip() for names in methods or () for name in names.split(",") if name.strip())
    if methods and not named:
        raise typer.BadParameter("it names no method", param_hint="'--methods'")
    options = options_of(EvaluateOptions, locals(), methods=named)
    with shown_progress(quiet=quiet) as progress:
        found = command.evaluate(model, options, progress=progress)
    for path in outputs:
        from int8cli.report.evaluation_page import write_evaluation

        write_evaluation(found, path)
        say_written(path, quiet=quiet)
    with writing_result():
        show(found, as_json=as_json, quiet=quiet)


def show(found: "Evaluation", *, as_json: bool, quiet: bool) -> None:
    from int8cli.report.evaluation import show_evaluation
    from int8cli.results.evaluation import evaluation_to_json

    if as_json:
        print(json.dumps(evaluation_to_json(found), indent=2))
    elif not quiet:
        show_evaluation(found)
