"""`int8cli convert`."""

import enum
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int8cli.cli import hints
from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import (
    CommitMessage,
    Device,
    Json,
    LayoutName,
    Model,
    OutlierColumns,
    Private,
    QuantizeDevice,
    Quiet,
    RetryFor,
    Revision,
    TextFile,
    Tokens,
    check_outputs,
    complete_path,
    options_of,
    say_written,
)
from int8cli.commands.options import CONVERT_TOKENS, RETRY_FOR_S, ConvertOptions

if TYPE_CHECKING:
    from int8cli.commands.convert import ConversionPlan, ConversionResult

EXAMPLES = """\
int8cli convert bigscience/bloom
int8cli convert ./my-model -o ./my-model-int8 --dry-run
int8cli convert org/name --revision v1.0 --skip '*.down_proj' --json > report.json
int8cli convert org/name --layout compressed-tensors
int8cli convert org/name --smooth auto
int8cli convert org/name --outliers statistics.safetensors --outlier-columns 4
int8cli convert org/name --outliers none --no-figures
int8cli convert org/name --report report.html
int8cli convert s3://bucket/model -o ./model-int8 --push-to s3://bucket/model-int8 --no-keep-output
int8cli convert org/name --push-to-hub your-name/name-int8
int8cli convert org/name --push-to-hub your-name/name-int8 --private --no-keep-output
"""

PAGES = (".html", ".png", ".svg")


class Float32(enum.StrEnum):
    """How float32 weights become int8."""

    direct = "direct"
    float16 = "float16"


class OnNonFinite(enum.StrEnum):
    """What to do with a weight that contains NaN or an infinity."""

    error = "error"
    keep = "keep"


Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Directory to write.", show_default="<name>-int8 here")
]
Layout = Annotated[LayoutName, typer.Option(help="Which loaders can open the output.")]


class Inputs8(enum.StrEnum):
    """How the inputs of an int8 layer are quantized."""

    absmax = "absmax"
    zeropoint = "zeropoint"
    none = "none"


Inputs = Annotated[
    Inputs8,
    typer.Option(help="How loaders of compressed-tensors round inputs; not all know zero points. none: weights only."),
]
Threshold = Annotated[
    float, typer.Option(help="llm_int8_threshold for the loader: larger inputs are multiplied in 16 bit.", min=0.0)
]
Skip = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Do not quantize modules that match this glob. Repeatable.")
]
Only = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Quantize only modules that match this glob. Repeatable.")
]
HowFloat32 = Annotated[
    Float32, typer.Option(help="Quantize float32 weights directly, or from float16 as bitsandbytes does.")
]
WhenNonFinite = Annotated[
    OnNonFinite, typer.Option(help="For a weight with NaN or Inf: stop, or keep it in its source dtype.")
]


def complete_outliers(incomplete: str) -> Iterator[str]:
    """The modes, then statistics files and the directories on the way to them."""
    yield from (mode for mode in ("auto", "activations", "weights", "none") if mode.startswith(incomplete))
    yield from complete_path(incomplete)


Outliers = Annotated[
    str,
    typer.Option(
        metavar="auto|activations|weights|none|FILE",
        help="How to choose the outlier columns to store exactly: run the model (activations), use the weights "
        "alone, read a statistics file of inspect-outliers, or store none. auto: activations if the model can be "
        "run, otherwise weights.",
        autocompletion=complete_outliers,
    ),
]


def complete_smooth(incomplete: str) -> Iterator[str]:
    """The modes, then statistics files and the directories on the way to them."""
    yield from (mode for mode in ("auto", "none") if mode.startswith(incomplete))
    yield from complete_path(incomplete)


Smooth = Annotated[
    str | None,
    typer.Option(
        metavar="auto|none|FILE",
        help="Move what is hard to round from inputs into weights by powers of two, where the run of the model proves "
        "that it computes the same bits (auto), or by a statistics file of inspect-outliers --smooth.",
        show_default="auto for compressed-tensors, else none",
        autocompletion=complete_smooth,
    ),
]

Workers = Annotated[
    int | None,
    typer.Option(
        help="Processes; each converts one shard at a time.", show_default="from cores and shards", min=1, max=256
    ),
]

Figures = Annotated[
    bool, typer.Option("--figures/--no-figures", help="Measure the error of every layer, or convert faster without.")
]
KeepSource = Annotated[bool, typer.Option("--keep-source", help="Keep downloaded shards in the Hub cache.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan, sizes and requirements. Fetches headers only, writes nothing.")
]
Details = Annotated[bool, typer.Option("--details", help="Show tables: the error by kind of layer, the worst layers.")]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report",
        help="Write a page with the error of every layer (.html), or a picture (.png, .svg).",
        metavar="FILE",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier conversion; other files are not touched.")
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        metavar="REPO", help="Upload each shard to this repository on the Hub as it is finished, and commit at the end."
    ),
]
PushTo = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="The same with an object store: s3://bucket/model, gs://bucket/model."),
]
PushRevision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch to push to; created if missing.", show_default="main")
]
KeepOutput = Annotated[
    bool,
    typer.Option("--keep-output/--no-keep-output", help="Whether shards that were pushed stay here as well."),
]


@shows_errors(hints.CONVERT, resumes=True)
def convert(
    model: Model,
    output: Output = None,
    revision: Revision = None,
    layout: Layout = LayoutName.bitsandbytes,
    inputs: Inputs = Inputs8.absmax,
    threshold: Threshold = 6.0,
    skip: Skip = None,
    only: Only = None,
    float32: HowFloat32 = Float32.direct,
    on_nonfinite: WhenNonFinite = OnNonFinite.error,
    outliers: Outliers = "auto",
    outlier_columns: OutlierColumns = None,
    smooth: Smooth = None,
    text: TextFile = None,
    tokens: Tokens = CONVERT_TOKENS,
    workers: Workers = None,
    device: QuantizeDevice = Device.cpu,
    figures: Figures = True,
    keep_source: KeepSource = False,
    retry_for: RetryFor = RETRY_FOR_S,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    push_to: PushTo = None,
    private: Private = False,
    push_revision: PushRevision = None,
    commit_message: CommitMessage = None,
    keep_output: KeepOutput = True,
    report: ReportFile = None,
    details: Details = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint to LLM.int8(), shard by shard, with a report of the error in every layer.

    The output loads in transformers with bitsandbytes or, with --layout compressed-tensors, in vLLM. Embeddings,
    norms, biases and the output head keep their dtype. After an interruption, run the same command again: finished
    shards are not converted twice.
    """
    if report is not None:
        if dry_run:
            raise typer.BadParameter("nothing is converted, so there is nothing to report", param_hint="'--report'")
        check_outputs((report,), PAGES, drawn=PAGES, option="--report")
    from int8cli.cli.choosing import choose_way
    from int8cli.cli.progress import shown_progress
    from int8cli.commands import convert as command

    options = options_of(ConvertOptions, locals())
    found: ConversionPlan | ConversionResult
    with shown_progress(quiet=quiet) as progress:
        if dry_run:
            found = command.plan_conversion(model, output, options, progress=progress)
        else:
            found = command.convert(model, output, options, progress=progress, choose=None if quiet else choose_way)
    if report is not None and not isinstance(found, command.ConversionPlan):
        from int8cli.report.conversion_page import write_conversion

        write_conversion(found.report, report)
        say_written(report, quiet=quiet)
    with writing_result():
        show(found, model, options, as_json=as_json, quiet=quiet, details=details)


def show(
    found: "ConversionPlan | ConversionResult",
    model: str,
    options: ConvertOptions,
    *,
    as_json: bool,
    quiet: bool,
    details: bool,
) -> None:
    from int8cli.cli.next_steps import after_convert
    from int8cli.commands.convert import ConversionPlan
    from int8cli.report.conversion import show_report
    from int8cli.report.conversion_summary import Cost, show_summary
    from int8cli.report.plan import plan_to_json, show_plan

    if isinstance(found, ConversionPlan):
        if as_json:
            print(json.dumps(plan_to_json(found.survey, found.needs, found.settings, found.ways), indent=2))
        elif not quiet:
            show_plan(found.survey, found.needs, found.output, found.settings, found.ways)
    elif as_json:
        print(json.dumps(found.report.to_json(), indent=2))
    elif not quiet:
        if details:
            show_report(found.report, found.output)
            print()
        cost = Cost(found.seconds, found.peak_memory_bytes)
        tables = "its tables are above" if details else "--details shows its tables"
        pushed = options.push_to_hub or options.push_to
        commands = after_convert(found.report, model, found.output, pushed, kept=options.keep_output)
        show_summary(found.report, found.output, cost, tables=tables, next_commands=commands, layouts=found.layouts)
