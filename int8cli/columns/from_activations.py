"""Columns from activations: the model runs on text, and each shard is converted as soon as the run has read it.

Owns how a calibration and a conversion share the shards of one source, so that each shard is fetched once.
"""

import json
import tempfile
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from int8cli.checkpoint.config_file import CONFIG_FILE
from int8cli.checkpoint.own_files import OwnPath
from int8cli.checkpoint.source import LocalFile, ShardFile, Source
from int8cli.columns.foreseen import planned_calibration
from int8cli.columns.from_statistics import StatisticsColumns
from int8cli.columns.wanted import ColumnStrategy, ColumnsWanted
from int8cli.conversion.column_source import ColumnSource, KnownColumns, RequireRoom, RunTask
from int8cli.errors import CannotRunError
from int8cli.llm_int8.limits import EXACT_STEPS
from int8cli.llm_int8.matmul import DEFAULT_INPUTS
from int8cli.model.memory import return_memory_promptly
from int8cli.model.skeleton import build_skeleton
from int8cli.model.text import Text
from int8cli.outliers.calibrate import CalibrateOptions, Calibration, UnitStatistics
from int8cli.planning.exponents import ShardSmoothing, TensorExponents
from int8cli.planning.survey import Survey
from int8cli.progress import Progress
from int8cli.records.conversion import WEIGHTS_ONLY, Settings
from int8cli.results.stored_columns import StoredColumns
from int8cli.workers.torch_threads import torch_threads


def strategy_from_activations(wanted: ColumnsWanted, survey: Survey, settings: Settings) -> ColumnStrategy:
    """Choose by a calibration. Raises TextError, and the errors that config.json and file names already show."""
    _require_text_model(survey)
    planned = planned_calibration(wanted, survey, settings)
    options = CalibrateOptions(
        wanted.sampling,
        settings.threshold or CalibrateOptions().threshold,
        wanted.device,
        leave_state=True,
        stored_columns=wanted.limit,
        smooth=wanted.smooth,
        smooth_steps=wanted.steps or EXACT_STEPS,
        smooth_for=None if settings.inputs == WEIGHTS_ONLY else DEFAULT_INPUTS,
    )
    run = CalibrationRun(planned.text, options, wanted)
    return ColumnStrategy(planned.survey, planned.settings, partial(_calibrated, survey, run))


def _calibrated(
    survey: Survey, run: "CalibrationRun", source: Source, state: OwnPath, progress: Progress
) -> "CalibratedColumns":
    return_memory_promptly()
    options = replace(run.options, state_directory=(state / "blocks").path, state_below=state.below)
    return CalibratedColumns(source, survey, replace(run, options=options), progress)


@dataclass(frozen=True, slots=True)
class CalibrationRun:
    """A calibration to run, and what its statistics are wanted for."""

    text: Text
    options: CalibrateOptions
    wanted: ColumnsWanted


class CalibratedColumns(ColumnSource):
    """Columns chosen by running the model. StatisticsColumns makes the choice.

    With a budget, the model runs to its end before the first shard is converted, and each shard is read once more.
    """

    def __init__(self, source: Source, survey: Survey, run: CalibrationRun, progress: Progress) -> None:
        self._source, self._survey, self._run, self._progress = source, survey, run, progress
        self._columns = StatisticsColumns(survey, run.wanted)

    def shards(self, require_room: RequireRoom) -> Generator[ShardFile]:
        """Run the model, and yield each shard with torch set to one thread. Raises what `calibrate` raises."""
        run = self._run
        with (
            torch_threads(run.wanted.model_threads),
            Calibration.of(self._source, self._survey, run.text, run.options, self._progress) as calibration,
            closing(calibration.run(require_room)) as steps,
        ):
            for step in steps:
                if isinstance(step, UnitStatistics):
                    self._columns.learn(step.sites, step.tensors)
                elif not run.wanted.budget:
                    with torch_threads(1):
                        yield step

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        return self._columns.columns_of(shard, local, run)

    def smoothing_of(self, shard: str) -> ShardSmoothing:
        return self._columns.smoothing_of(shard)

    def known(self, shard: str) -> KnownColumns:
        return self._columns.known(shard)

    def settled(self) -> Mapping[str, TensorExponents]:
        return self._columns.settled()


def _require_text_model(survey: Survey) -> None:
    """Raises CannotRunError for a model that cannot be built, or that takes other inputs than text."""
    with tempfile.TemporaryDirectory(prefix="int8cli-") as name:
        if survey.has_config:
            (Path(name) / CONFIG_FILE).write_text(json.dumps(dict(survey.config)))
        specs = {stored.spec.name: stored.spec for contents in survey.source_shards for stored in contents.tensors}
        model = build_skeleton(Path(name), specs).model
    if model.main_input_name != "input_ids":
        raise CannotRunError(f"{type(model).__name__} needs {model.main_input_name}, not text")
