"""`int8cli convert`."""

import enum
import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import (
    Device,
    Json,
    LayoutName,
    Model,
    Quiet,
    Revision,
    TextFile,
    default_output,
    require_device,
    usable_cores,
)
from int8cli.workers.torch_start import start_torch

if TYPE_CHECKING:
    from int8cli.checkpoint.source import Source
    from int8cli.cli.progress import ProgressObserver
    from int8cli.columns.wanted import ColumnStrategy, ColumnsWanted
    from int8cli.conversion.column_source import ColumnSource
    from int8cli.conversion.convert import ConvertOptions
    from int8cli.planning.survey import Survey
    from int8cli.records.store import Settings
    from int8cli.results.conversion import ConversionReport

Show = Callable[[bool, bool], None]  # as_json, quiet

EXAMPLES = """\
int8cli convert bigscience/bloom
int8cli convert ./my-model -o ./my-model-int8 --dry-run
int8cli convert org/name --revision v1.0 --skip '*.down_proj' --json > report.json
int8cli convert org/name --layout compressed-tensors
int8cli convert org/name --outliers statistics.safetensors --outlier-columns 4
int8cli convert org/name --outliers none --no-figures
"""
# With more, a disk sets the pace; with less to do, the processes' start.
MOST_WORKERS = 8
LEAST_BYTES_FOR_WORKERS = 10**9


class Float32(enum.StrEnum):
    """How float32 weights become int8."""

    direct = "direct"
    float16 = "float16"


class OnNonFinite(enum.StrEnum):
    """What to do with a weight that holds NaN or an infinity."""

    error = "error"
    keep = "keep"


@shows_errors
def convert(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write.", show_default="<name>-int8 here")
    ] = None,
    revision: Revision = None,
    layout: Annotated[LayoutName, typer.Option(help="For which loaders to write.")] = LayoutName.bitsandbytes,
    threshold: Annotated[
        float, typer.Option(help="llm_int8_threshold for the loader: inputs from here on go through 16 bit.", min=0.0)
    ] = 6.0,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave modules alone, by glob on their names. Repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Quantize no other modules. Repeatable.")
    ] = None,
    float32: Annotated[
        Float32, typer.Option(help="float32 weights: as they are, or through float16 as bitsandbytes does.")
    ] = Float32.direct,
    on_nonfinite: Annotated[
        OnNonFinite, typer.Option(help="A weight with NaN or Inf: stop, or keep it in its source dtype.")
    ] = OnNonFinite.error,
    outliers: Annotated[
        str,
        typer.Option(
            metavar="auto|activations|weights|none|FILE",
            help="Store outlier columns exactly, chosen by running the model, by its weights alone, by a statistics "
            "file of inspect-outliers, or not at all. auto: activations where that can run, or else weights.",
        ),
    ] = "auto",
    outlier_columns: Annotated[
        int | None,
        typer.Option(help="Columns to store of each linear, at most.", show_default="as measured to be best", min=0),
    ] = None,
    text: TextFile = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it to run, in all.", min=1)] = 4096,
    workers: Annotated[
        int | None, typer.Option(help="Processes, one shard each.", show_default="by cores and shards", min=1, max=256)
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to quantize.")] = Device.cpu,
    figures: Annotated[
        bool,
        typer.Option("--figures/--no-figures", help="Measure the error of every layer, or convert in less time."),
    ] = True,
    keep_source: Annotated[
        bool, typer.Option("--keep-source", help="Keep downloaded shards, in the Hub cache.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, sizes and needs; fetch headers only, write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew over an earlier conversion; other files are not touched.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint to LLM.int8(), shard by shard, with a report of the error in every layer.

    The output opens in transformers + bitsandbytes as it is or, with --layout compressed-tensors, in vLLM. Embeddings,
    norms, biases and the output head stay in their dtype. Run the same command again after an interruption: finished
    shards are not done twice.
    """
    if not math.isfinite(threshold):
        raise typer.BadParameter("a threshold is a finite number", param_hint="'--threshold'")
    outliers = _outliers(outliers, text)
    output = output or default_output(model)
    if not dry_run and device is Device.cpu:
        _start_server_early(model, output, outliers, workers)
    from int8cli.checkpoint.locate import open_source
    from int8cli.cli.progress import observe
    from int8cli.columns.wanted import ColumnsWanted
    from int8cli.conversion.convert import ConvertOptions
    from int8cli.model.sampling import Sampling
    from int8cli.planning.layouts import LAYOUTS
    from int8cli.planning.plan import PlanOptions
    from int8cli.planning.survey import survey_source
    from int8cli.records.store import RecordStore, Settings

    require_device(device)
    settings = Settings(layout.value, threshold, tuple(skip or ()), tuple(only or ()), float32.value, figures=figures)
    store = RecordStore(output)
    known = store.conversion() if not overwrite else None
    wanted = ColumnsWanted(
        outliers,
        _columns_at_most(outliers) if outlier_columns is None else outlier_columns,
        text,
        Sampling(tokens),
        device.value,
        usable_cores(),
        known.settings if known is not None else None,
    )
    with observe(quiet=quiet) as observer:
        source = open_source(
            model,
            revision=revision,
            download_dir=store.incoming_directory,
            output=output,
            keep_source=keep_source,
            on_bytes=observer.received,
            on_wait=observer.waiting,
        )
        try:
            survey = survey_source(source, PlanOptions(settings.skip, settings.only), LAYOUTS[settings.layout])
            workers = workers or _workers(survey, device)
            threads = _threads(workers, device)
            options = ConvertOptions(output, on_nonfinite.value, overwrite, workers, threads, device.value)
            job = _Job(source, survey, settings, wanted, options, store.calibration_directory, observer)
            show = job.plan() if dry_run else job.convert()
        finally:
            source.close()
    with writing_result():
        show(as_json, quiet)


@dataclass(frozen=True, slots=True)
class _Job:
    """A conversion that is ready to be planned or run; both give back what shows the result."""

    source: "Source"
    survey: "Survey"
    settings: "Settings"
    wanted: "ColumnsWanted"
    options: "ConvertOptions"
    kept_in: Path
    observer: "ProgressObserver"

    def plan(self) -> Show:
        """What would be done; writes nothing."""
        from int8cli.cli.progress import warnings
        from int8cli.report.plan import Needs, plan_to_json, show_plan

        way = next(self._strategies())
        survey, settings = way.survey, way.settings
        for warning in warnings(survey):
            self.observer.noted(warning)
        output, threads = self.options.output, self.options.threads * self.options.workers
        needs = Needs.of(self.source, survey, output, threads=threads)

        def show(as_json: bool, quiet: bool) -> None:
            if as_json:
                print(json.dumps(plan_to_json(survey, needs, settings), indent=2))
            elif not quiet:
                show_plan(survey, needs, output, settings)

        return show

    def convert(self) -> Show:
        """Convert, by the best way to know the outlier columns that turns out to be passable."""
        from int8cli.report.conversion import show_report

        report = self._converted()

        def show(as_json: bool, quiet: bool) -> None:
            if as_json:
                print(json.dumps(report.to_json(), indent=2))
            elif not quiet:
                show_report(report, self.options.output)

        return show

    def _converted(self) -> "ConversionReport":
        from int8cli.conversion.convert import convert as run
        from int8cli.errors import CANNOT_CALIBRATE
        from int8cli.records.store import NO_OUTLIERS
        from int8cli.report.card import render_card

        if self.options.workers == 1:
            start_torch()
        ways = self._strategies()
        way = next(ways)
        while True:
            if self.wanted.mode != NO_OUTLIERS:
                self.observer.noted(_told(way))
            columns = self._columns(way)
            try:
                return run(self.source, way.survey, way.settings, self.options, render_card, self.observer, columns)
            except CANNOT_CALIBRATE as error:
                following = next(ways, None)
                if following is None:
                    raise
                self.observer.noted(f"the activations cannot be looked at: {error}")
                way = following

    def _columns(self, way: "ColumnStrategy") -> "ColumnSource":
        from int8cli.cli.calibration_progress import CalibrationProgress

        return way.columns(CalibrationProgress(self.observer))

    def _strategies(self) -> "Iterator[ColumnStrategy]":
        """The ways to know the columns, the best first."""
        from int8cli.columns.choose import column_strategies

        return column_strategies(
            self.wanted, self.source, self.survey, self.settings, self.kept_in, self.observer.noted
        )


def _told(way: "ColumnStrategy") -> str:
    """Where the outlier columns will be known from and what that costs, in a line."""
    from int8cli.records.store import FROM_ACTIVATIONS, FROM_STATISTICS, NO_OUTLIERS
    from int8cli.report.units import human_bytes, human_seconds

    settings, survey = way.settings, way.survey
    if settings.outliers == NO_OUTLIERS:
        return "outlier columns: none are stored"
    if settings.outliers == FROM_ACTIVATIONS:
        known = f"from the activations, {settings.calibration}; some {human_seconds(way.arithmetic_s())} of arithmetic"
    elif settings.outliers == FROM_STATISTICS:
        known = "by the statistics given"
    else:
        known = "suspects only, told by the weights alone"
    size = f"{human_bytes(survey.sidecar_bytes)} beside {human_bytes(survey.output_bytes)}"
    return f"outlier columns: {known}; up to {settings.outlier_columns} of each linear, {size}"


def _outliers(value: str, text: Path | None) -> str:
    """The value of --outliers, if it is one: a mode, or the path of a file."""
    from int8cli.columns.wanted import AUTO, MODES
    from int8cli.records.store import FROM_ACTIVATIONS

    looks_like_a_file = Path(value).is_file() or Path(value).suffix or len(Path(value).parts) > 1
    if value not in MODES and not looks_like_a_file:
        near = get_close_matches(value, MODES, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise typer.BadParameter(
            f"{value!r} is none of {', '.join(MODES)}, and no file{meant}", param_hint="'--outliers'"
        )
    if text is not None and value not in (AUTO, FROM_ACTIVATIONS):
        raise typer.BadParameter(f"--outliers {value} reads no text", param_hint="'--text'")
    return value


def _columns_at_most(outliers: str) -> int:
    """How many columns of a linear are stored unless told otherwise."""
    from int8cli.columns.wanted import DEFAULT_OUTLIER_COLUMNS
    from int8cli.records.store import NO_OUTLIERS

    return DEFAULT_OUTLIER_COLUMNS if outliers != NO_OUTLIERS else 0


def _workers(survey: "Survey", device: Device) -> int:
    """A process for every core, since threads of one get in each other's way; one where the network sets the pace.

    One for a GPU, too: its threads wait more than they compute, and each process would take memory of it.
    """
    if device is Device.cuda or survey.identity.on_hub:
        return 1
    return _workers_over(len(survey.shards), survey.source_bytes)


def _workers_over(shards: int, source_bytes: int) -> int:
    return max(1, min(shards, usable_cores(), MOST_WORKERS)) if source_bytes >= LEAST_BYTES_FOR_WORKERS else 1


def _start_server_early(model: str, output: Path, outliers: str, workers: int | None) -> None:
    """Have torch imported for workers while this process imports the rest and reads headers, if some are foreseen.

    Where they are not, it happens when they are needed; a server that was started in vain ends with this process.
    """
    from int8cli.conversion import WORKER_PRELOAD
    from int8cli.model.extra import has_transformers
    from int8cli.planning.output_files import REPORT_FILE
    from int8cli.records.store import FROM_WEIGHTS, NO_OUTLIERS
    from int8cli.workers.processes import start_server

    if outliers not in (NO_OUTLIERS, FROM_WEIGHTS) and has_transformers():
        return  # a calibration may do the work itself, and has torch imported here
    directory = Path(model).expanduser()
    with suppress(OSError):  # what cannot be read is told by whoever needs it
        files = list(directory.glob("*.safetensors")) or list(directory.glob("*.bin"))
        foreseen = workers or _workers_over(len(files), sum(file.stat().st_size for file in files if file.is_file()))
        if files and foreseen > 1 and not (output / REPORT_FILE).exists():  # which a finished conversion has
            start_server(WORKER_PRELOAD)


def _threads(workers: int, device: Device) -> int:
    """Of each process. A GPU gets them all however few the cores: one reads, one waits for the GPU, one writes."""
    from int8cli.planning.blocks import THREADS_FOR_A_SHARD

    if device is Device.cuda:
        return THREADS_FOR_A_SHARD
    return max(1, min(THREADS_FOR_A_SHARD, usable_cores() // workers))
