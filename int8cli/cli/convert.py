"""`int8cli convert`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from int8cli.cli import hints
from int8cli.cli.convert_options import (
    ConvertedInputs,
    Details,
    DryRun,
    Figures,
    Finish,
    Float32,
    HowFloat32,
    Inputs,
    KeepOutput,
    KeepSource,
    Layout,
    Only,
    OnNonFinite,
    OnRay,
    OutlierBudget,
    Outliers,
    Output,
    Overwrite,
    Part,
    PushRevision,
    PushTo,
    PushToHub,
    ReportFile,
    Skip,
    Smooth,
    Threshold,
    WhenNonFinite,
    Workers,
)
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
int8cli convert org/name --outliers statistics.safetensors --outlier-budget 1%
int8cli convert org/name --outliers none --no-figures
int8cli convert org/name --report report.html
int8cli convert s3://bucket/model -o ./model-int8 --push-to s3://bucket/model-int8 --no-keep-output
int8cli convert org/name --push-to-hub your-name/name-int8
int8cli convert org/name --push-to-hub your-name/name-int8 --private --no-keep-output
int8cli convert org/name -o /shared/name-int8 --outliers none --part 3/8
"""


@shows_errors(hints.CONVERT, resumes=True)
def convert(
    model: Model,
    output: Output = None,
    revision: Revision = None,
    layout: Layout = LayoutName.bitsandbytes,
    inputs: Inputs = ConvertedInputs.absmax,
    threshold: Threshold = 6.0,
    skip: Skip = None,
    only: Only = None,
    float32: HowFloat32 = Float32.direct,
    on_nonfinite: WhenNonFinite = OnNonFinite.error,
    outliers: Outliers = "auto",
    outlier_columns: OutlierColumns = None,
    outlier_budget: OutlierBudget = None,
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
    part: Part = None,
    finish: Finish = False,
    ray: OnRay = None,
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
    check_report(report, dry_run=dry_run, part=part, details=details)
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
        write_page(found, report, quiet=quiet)
    with writing_result():
        if part is not None and not isinstance(found, command.ConversionPlan):
            show_part(found, part, as_json=as_json, quiet=quiet)
        else:
            show(found, model, options, as_json=as_json, quiet=quiet, details=details)


def check_report(report: Path | None, *, dry_run: bool, part: tuple[int, int] | None, details: bool) -> None:
    """Refuse a page or tables where there will be no report, and a page that cannot be drawn."""
    if report is not None:
        if dry_run:
            raise typer.BadParameter("nothing is converted, so there is nothing to report", param_hint="'--report'")
        check_outputs((report,), option="--report")
    if part is not None and (report is not None or details):
        option = "'--report'" if report is not None else "'--details'"
        raise typer.BadParameter("a part has no report of the whole: --finish has one", param_hint=option)


def write_page(found: "ConversionResult", page: Path, *, quiet: bool) -> None:
    from int8cli.report.conversion_page import write_conversion

    write_conversion(found.report, page)
    say_written(page, quiet=quiet)


def show_part(found: "ConversionResult", part: tuple[int, int], *, as_json: bool, quiet: bool) -> None:
    from int8cli.report.part import part_to_json, show_part_ended

    if as_json:
        document = part_to_json(part, found.output, found.report, found.missing, to_publish=found.to_publish)
        print(json.dumps(document, indent=2))
    elif not quiet:
        conclude = "the same command with --finish in place of --part" if found.to_publish else ""
        show_part_ended(part, found.output, found.report, found.missing, found.seconds, conclude=conclude)


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
            document = plan_to_json(found.survey, found.needs, found.settings, found.ways, found.share)
            print(json.dumps(document, indent=2))
        elif not quiet:
            show_plan(found.survey, found.needs, found.output, found.settings, found.ways, found.share)
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
