"""A conversion once its options are checked and its source is open: it can be planned, or run.

Owns how a strategy for the outlier columns, the places where shards are converted and the destination come together.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.own_files import OwnPath
from int8cli.checkpoint.source import Source
from int8cli.checkpoint.source_card import NO_CARD, SourceCard, read_source_card
from int8cli.columns.choose import column_strategies
from int8cli.columns.foreseen import foreseen_settings, may_run
from int8cli.columns.wanted import AUTO, ColumnStrategy, ColumnsWanted
from int8cli.commands.conversion_results import ConversionPlan
from int8cli.commands.conversion_words import described, first_line
from int8cli.commands.fallback import with_first_that_works
from int8cli.commands.in_parts import planned_share
from int8cli.commands.on_ray import OnCluster
from int8cli.commands.push import Push
from int8cli.commands.ways import speed_here, speed_without_torch, ways_to_convert
from int8cli.conversion.convert import ConversionRun, require_possible
from int8cli.conversion.convert import convert as convert_shards
from int8cli.conversion.finish import RenderCard
from int8cli.conversion.part import PartOutcome, PartRun, convert_part
from int8cli.errors import CheckpointError, SourceError
from int8cli.estimate.ways import Way
from int8cli.planning.mixtures import about_experts, layout_shares
from int8cli.planning.needs import Needs
from int8cli.planning.room import AtOnce
from int8cli.planning.survey import Survey
from int8cli.planning.warnings import warnings_of
from int8cli.progress import Progress
from int8cli.records.conversion import NO_OUTLIERS, STEPS, Settings
from int8cli.records.store import RecordStore
from int8cli.report.card import render_card
from int8cli.results.conversion import ConversionReport
from int8cli.workers.torch_start import start_torch

# If it takes longer than this, a user who did not ask for a calibration is asked, or gets the alternatives.
LONG_S = 300.0
Choose = Callable[[Sequence[Way]], Way]


@dataclass(frozen=True, slots=True)
class ConversionJob:
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
            left_over=store.unfinished.left_over,
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

    def chosen(self, choose: Choose) -> "ConversionJob":
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

    def on(self, cluster: OnCluster) -> "ConversionJob":
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
