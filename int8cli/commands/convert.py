"""Convert a checkpoint, or plan the conversion.

Owns how a conversion is set up.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.disk import system_errors
from int8cli.checkpoint.locate import opened_source
from int8cli.checkpoint.lock import refuse_if_in_use
from int8cli.checkpoint.own_files import OwnPath
from int8cli.checkpoint.source import Source
from int8cli.checkpoint.source_card import NO_CARD, SourceCard, read_source_card
from int8cli.columns.choose import column_strategies
from int8cli.columns.foreseen import foreseen_settings, may_run
from int8cli.columns.wanted import AUTO, ColumnStrategy, ColumnsWanted
from int8cli.commands.checks import check_convert, check_device
from int8cli.commands.conversion_results import ConversionPlan as ConversionPlan
from int8cli.commands.conversion_results import ConversionResult as ConversionResult
from int8cli.commands.conversion_words import described, first_line
from int8cli.commands.fallback import with_first_that_works
from int8cli.commands.in_parts import part_of, planned_share, shards_of
from int8cli.commands.on_ray import OnCluster, joined_cluster
from int8cli.commands.options import ConvertOptions
from int8cli.commands.parallelism import choose_threads, choose_workers, start_workers_early
from int8cli.commands.places import chosen_output
from int8cli.commands.push import Push, push_of
from int8cli.commands.wanted_columns import columns_wanted, why_not_smoothed
from int8cli.commands.ways import speed_here, speed_without_torch, ways_to_convert
from int8cli.conversion.convert import ConversionRun, require_possible
from int8cli.conversion.convert import convert as convert_shards
from int8cli.conversion.finish import RenderCard
from int8cli.conversion.part import PartOutcome, PartRun, convert_part
from int8cli.errors import CheckpointError, SourceError
from int8cli.estimate.ways import Way
from int8cli.machine.memory_use import peak_memory_bytes
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.layouts import LAYOUTS, layout_of
from int8cli.planning.mixtures import about_experts, layout_shares
from int8cli.planning.needs import Needs
from int8cli.planning.room import AtOnce
from int8cli.planning.survey import Survey, survey_source
from int8cli.planning.warnings import warnings_of
from int8cli.progress import SILENT, Progress
from int8cli.records.conversion import NO_OUTLIERS, STEPS, Settings
from int8cli.records.store import RecordStore
from int8cli.report.card import render_card
from int8cli.results.conversion import ConversionReport
from int8cli.workers.torch_start import start_torch, torch_threads_restored

# If it takes longer than this, a user who did not ask for a calibration is asked, or gets the alternatives.
LONG_S = 300.0
Choose = Callable[[Sequence[Way]], Way]
_DEFAULTS = ConvertOptions()


@system_errors()
def convert(
    model: str | Path,
    output: str | Path | None = None,
    options: ConvertOptions = _DEFAULTS,
    *,
    progress: Progress = SILENT,
    choose: Choose | None = None,
) -> ConversionResult:
    """Convert a checkpoint to LLM.int8(), shard by shard.

    `model` is a Hub id, a directory, or one checkpoint file. `output` is the directory to write, by default
    `<name>-int8` in the current directory. After an interruption, the same call resumes: finished shards are not
    converted again. `choose` is asked which way to take where "auto" would take longer than `LONG_S`; without it, the
    first one is taken.

    Raises OptionError for invalid options, and other children of Int8cliError for problems with the model, the network
    or the disk. After any exception, no file is half-written under its final name.
    """
    begun_s = time.monotonic()
    check_convert(options)
    output = chosen_output(output, str(model))
    start_workers_early(str(model), output, options)
    with torch_threads_restored(), _prepared(str(model), output, options, progress) as job:
        job.prepare()
        if choose is not None:
            job = job.chosen(choose)
        outcome = job.convert_part(job.part) if job.part is not None else PartOutcome(_all_of(job, model, options), ())
        peak = peak_memory_bytes() if job.run.workers == 1 and options.ray is None else None
        seconds = time.monotonic() - begun_s
        layouts = layout_shares(job.survey)
        return ConversionResult(output, outcome.report, seconds, peak, layouts, outcome.missing, outcome.to_publish)


@system_errors()
def plan_conversion(
    model: str | Path,
    output: str | Path | None = None,
    options: ConvertOptions = _DEFAULTS,
    *,
    progress: Progress = SILENT,
) -> ConversionPlan:
    """What `convert` would do with the same arguments: the plan by tensor, exact sizes, and the requirements.

    Fetches headers only and writes nothing. A cluster is joined, or started, to learn what it has. Raises what
    `convert` raises before it writes its first byte.
    """
    check_convert(options)
    output = chosen_output(output, str(model))
    with torch_threads_restored(), _prepared(str(model), output, options, progress) as job:
        if options.ray is None:
            return job.plan()
        with joined_cluster(str(model), options.ray, job.smoothed_survey, options) as cluster:
            return job.on(cluster).plan()


def _all_of(job: "_Job", model: str | Path, options: ConvertOptions) -> ConversionReport:
    """Convert all shards, here or on a cluster."""
    if options.ray is None:
        return job.convert()
    with joined_cluster(str(model), options.ray, job.smoothed_survey, options) as cluster:
        return job.on(cluster).convert()


def settings_of(options: ConvertOptions) -> Settings:
    """The options that determine the bytes of the output. The strategy for the outlier columns adds its part."""
    patterns = tuple(options.skip), tuple(options.only)
    exact = options.layout, options.threshold
    return Settings(*exact, *patterns, options.float32, figures=options.figures, inputs=options.inputs)


def _at_once(workers: int, options: ConvertOptions) -> AtOnce:
    """What is on the disk while each worker converts a shard: the next one is fetched, and the last one uploaded."""
    return AtOnce(None if options.keep_output else workers + 1, workers + 1 if workers > 1 else None)


@contextmanager
def _prepared(model: str, output: Path, options: ConvertOptions, progress: Progress) -> Iterator["_Job"]:
    if options.ray is None:  # else the machines of the cluster have it
        check_device(options.device)
    settings = settings_of(options)
    part = part_of(options)
    store = RecordStore(output, part.token if part is not None else None)
    store.refuse_links()
    refuse_if_in_use(output, store.own)
    known = store.conversion() if not options.overwrite else None
    wanted = columns_wanted(options, known.settings if known is not None else None)
    with opened_source(
        model,
        revision=options.revision,
        download_dir=store.incoming_directory,
        output=output,
        keep_source=options.keep_source,
        retry_for_s=options.retry_for,
        progress=progress,
    ) as source:
        target = layout_of(options.layout, options.inputs) or LAYOUTS[options.layout]
        survey = survey_source(source, PlanOptions(settings.skip, settings.only), target)
        workers = options.workers or choose_workers(source, shards_of(part, survey), options.device)
        threads = options.threads or choose_threads(workers, options.device)
        run = ConversionRun(output, options.on_nonfinite, options.overwrite, workers, threads, options.device)
        run = replace(run, at_once=_at_once(workers, options))
        state = OwnPath(store.calibration_directory, output, store.aside)
        push = push_of(options, progress)
        yield _Job(source, survey, settings, wanted, run, state, progress, why_not_smoothed(options), part, push)


@dataclass(frozen=True, slots=True)
class _Job:
    """A conversion that is ready to be planned or run. An interrupted run resumes from the files in `state`.

    `not_smoothed` says that it will not be smoothed, where somebody may expect that it is.
    """

    source: Source
    survey: Survey
    settings: Settings
    wanted: ColumnsWanted
    run: ConversionRun
    state: OwnPath
    progress: Progress
    not_smoothed: str = ""
    part: PartRun | None = None
    push: Push | None = None
    cluster: OnCluster | None = None

    @property
    def smoothed_survey(self) -> Survey:
        """The survey, with how the conversion will be smoothed, as far as that is known before a strategy is tried."""
        return replace(self.survey, smooth=STEPS.get(self._foreseen.smooth))

    @property
    def _foreseen(self) -> Settings:
        return foreseen_settings(self.wanted, self.source, self.survey, self.settings)

    def plan(self) -> ConversionPlan:
        return with_first_that_works(self._strategies(), self._planned_by, self.progress.note)

    def _planned_by(self, strategy: ColumnStrategy) -> ConversionPlan:
        run, survey, share = self.run, strategy.survey, planned_share(self.part, strategy.survey)
        store = RecordStore(run.output, None if self.part is None else self.part.token)
        cluster = None if self.cluster is None else self.cluster.needs(strategy, self.wanted.sampling)
        for warning in warnings_of(survey):
            self.progress.note(warning)
        self._note_experts()
        needs = Needs.of(
            self.source,
            survey,
            run.output,
            buffer_bytes=survey.buffer_bytes(run.threads * run.workers, run.workers),
            at_once=run.at_once,
            shards=None if share is None else share.shards,
            left_over=store.left_over,
            cluster=cluster,
        )
        return ConversionPlan(run.output, survey, strategy.settings, needs, self._ways(), share)

    def prepare(self) -> None:
        """Refuse what cannot be before torch is imported, and say what is about to be done."""
        if self.part is None:
            require_possible(self.source, self.survey, self._foreseen, self.run)
        self.progress.note(first_line(self.survey, self.run.output, self.push, self.part))
        self._note_experts()
        if self.not_smoothed:
            self.progress.note(self.not_smoothed)
        if isinstance(self.source, DirectorySource) and self.source.contains_output:
            self.progress.note(f"warning: {self.run.output} is inside the directory of the source")

    def chosen(self, choose: Choose) -> "_Job":
        """This job or, where it takes long without having been asked for, the one that `choose` wants instead."""
        wanted = self.wanted
        if (
            self.part is not None
            or wanted.mode != AUTO
            or wanted.known is not None
            or wanted.nothing(self.survey)
            or not may_run(self.source)
        ):
            return self
        ways = self._ways()
        if (ways[0].seconds or 0.0) <= LONG_S:
            return self
        way = choose(ways)
        return self if way == ways[0] else replace(self, wanted=replace(wanted, mode=way.outliers))

    def on(self, cluster: OnCluster) -> "_Job":
        """The same job on a cluster."""
        outputs = None if self.run.at_once.outputs is None else cluster.slots  # each worker uploads what it converted
        at_once = AtOnce(outputs, cluster.slots, elsewhere=True)
        run = replace(self.run, at_once=at_once, workers=1, threads=cluster.threads)
        threads = cluster.model_threads(self.survey, self.wanted.sampling)
        wanted = replace(self.wanted, model_threads=threads)
        return replace(self, run=run, wanted=wanted, cluster=cluster)

    def convert(self) -> ConversionReport:
        """Convert with the first strategy that works for this model."""
        if self.run.workers == 1 and self.cluster is None:
            start_torch()
        return with_first_that_works(self._strategies(), self._convert_by, self.progress.note)

    def convert_part(self, part: PartRun) -> PartOutcome:
        """Convert one part. Its columns cannot come from a run of the model."""
        if self.run.workers == 1 and part.share is not None:
            start_torch()
        strategy = next(self._strategies())
        columns = strategy.columns(self.source, self.state, self.progress)
        run, survey, settings = self._run_with(strategy), strategy.survey, strategy.settings
        return convert_part(self.source, survey, settings, run, part, self._render(), self.progress, columns)

    def _ways(self) -> tuple[Way, ...]:
        here = "torch" in sys.modules or self.wanted.device != "cpu"
        speed = speed_here(self.wanted.device) if here else speed_without_torch(self.progress)
        return ways_to_convert(self.source, self.survey, self.run, self.wanted, speed)

    def _note_experts(self) -> None:
        said = about_experts(layout_shares(self.survey))
        if said is not None:
            self.progress.note(said)

    def _convert_by(self, strategy: ColumnStrategy) -> ConversionReport:
        """Convert on this machine, or on the cluster."""
        elsewhere = columns = None
        if self.cluster is not None:
            elsewhere = self.cluster.run(self.source, strategy, self.wanted.sampling, self.progress)
        else:
            columns = strategy.columns(self.source, self.state, self.progress)
        run, survey, settings = self._run_with(strategy), strategy.survey, strategy.settings
        return convert_shards(self.source, survey, settings, run, self._render(), self.progress, columns, elsewhere)

    def _run_with(self, strategy: ColumnStrategy) -> ConversionRun:
        """The run, with what to say about the strategy's columns, and where it is pushed to."""
        run = self.run
        if self.wanted.mode != NO_OUTLIERS:
            run = replace(run, about_columns=partial(described, strategy, self.wanted))
        if self.push is not None:
            run = replace(run, destination=self.push.destination(run.output, strategy.survey, self.part))
        return run

    def _render(self) -> RenderCard:
        return partial(render_card, source_card=self._source_card())

    def _source_card(self) -> SourceCard:
        """What the source's card says of license and task. A card that cannot be read stops no conversion."""
        try:
            return read_source_card(self.source)
        except (CheckpointError, SourceError) as error:
            self.progress.note(f"warning: {error}; the new model card names no license")
            return NO_CARD

    def _strategies(self) -> Iterator[ColumnStrategy]:
        """The strategies for choosing the columns, best first."""
        return column_strategies(self.wanted, self.source, self.survey, self.settings, self.progress.note)
