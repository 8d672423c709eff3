"""Columns from activations: the model runs on text, and each shard is converted as soon as the run has read it.

Owns how a calibration and a conversion share the shards of one source, so that each shard is fetched once.
"""

import json
import tempfile
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from int8cli.checkpoint.config_file import CONFIG_FILE
from int8cli.checkpoint.source import LocalFile, ShardFile, Source
from int8cli.columns.from_statistics import StatisticsColumns, at_most
from int8cli.columns.wanted import ColumnStrategy, ColumnsWanted
from int8cli.conversion.column_source import ColumnSource, RequireRoom, RunTask
from int8cli.data import SAMPLE_NAME, sample_text
from int8cli.errors import CannotRunError
from int8cli.model.memory import return_memory_promptly
from int8cli.model.skeleton import build_skeleton
from int8cli.model.text import Text
from int8cli.outliers.calibrate import CalibrateOptions, Calibration, UnitStatistics
from int8cli.outliers.cost import arithmetic_s
from int8cli.planning.survey import Survey
from int8cli.progress import Progress
from int8cli.records.conversion import FROM_ACTIVATIONS, Settings
from int8cli.results.stored_columns import StoredColumns
from int8cli.workers.torch_threads import torch_threads


def strategy_from_activations(
    wanted: ColumnsWanted, source: Source, survey: Survey, settings: Settings, state_directory: Path
) -> ColumnStrategy:
    """Choose by a calibration. Raises TextError, and errors that can be detected from config.json and file names."""
    dtype = _dtype_to_run_in(survey)
    sampling = wanted.sampling
    if wanted.text is not None:
        text = Text.read(wanted.text, sampling.tokens)
    else:
        text = Text.decode(SAMPLE_NAME, sample_text())
    options = CalibrateOptions(
        sampling,
        settings.threshold or CalibrateOptions().threshold,
        wanted.device,
        state_directory / "blocks",
        leave_state=True,
        stored_columns=wanted.limit,
    )

    def columns(progress: Progress) -> ColumnSource:
        return_memory_promptly()
        run = CalibrationRun(text, options, wanted.model_threads)
        return CalibratedColumns(source, survey, run, progress)

    def seconds() -> float:
        parameters = survey.plan.quantized_parameters
        return arithmetic_s(parameters, sampling.tokens, dtype, wanted.device, wanted.model_threads)

    used = f"{text.name}: {sampling.tokens:,} tokens in sequences of {sampling.sequence_length:,}"
    used += f", seed {sampling.seed}, sha256 {text.sha256[:16]}"
    return ColumnStrategy(
        replace(survey, stored_counts={e.spec.name: at_most(e, wanted.limit) for e in survey.plan.quantized}),
        replace(settings, outliers=FROM_ACTIVATIONS, outlier_columns=wanted.limit, calibration=used),
        columns,
        seconds,
    )


@dataclass(frozen=True, slots=True)
class CalibrationRun:
    """A calibration to run. `model_threads` is the number of torch threads while the model runs."""

    text: Text
    options: CalibrateOptions
    model_threads: int = 1


class CalibratedColumns(ColumnSource):
    """Columns chosen by running the model. StatisticsColumns makes the choice."""

    def __init__(self, source: Source, survey: Survey, run: CalibrationRun, progress: Progress) -> None:
        self._source, self._survey, self._run, self._progress = source, survey, run, progress
        self._columns = StatisticsColumns(survey, run.options.stored_columns)

    def shards(self, require_room: RequireRoom) -> Generator[ShardFile]:
        """Run the model, and yield each shard with torch set to one thread. Raises what `calibrate` raises."""
        run = self._run
        with (
            torch_threads(run.model_threads),
            Calibration.of(self._source, self._survey, run.text, run.options, self._progress) as calibration,
            closing(calibration.run()) as steps,
        ):
            require_room(calibration.peak_shard_bytes)
            for step in steps:
                if isinstance(step, UnitStatistics):
                    self._columns.learn(step.sites)
                else:
                    with torch_threads(1):
                        yield step

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        return self._columns.columns_of(shard, local, run)


def _dtype_to_run_in(survey: Survey) -> torch.dtype:
    """The dtype of the model's activations. Raises CannotRunError if it cannot be built or its input is not text."""
    with tempfile.TemporaryDirectory(prefix="int8cli-") as name:
        if survey.has_config:
            (Path(name) / CONFIG_FILE).write_text(json.dumps(dict(survey.config)))
        specs = {stored.spec.name: stored.spec for contents in survey.shards for stored in contents.tensors}
        skeleton = build_skeleton(Path(name), specs)
    model = skeleton.model
    if model.main_input_name != "input_ids":
        raise CannotRunError(f"{type(model).__name__} needs {model.main_input_name}, not text")
    return skeleton.dtype
