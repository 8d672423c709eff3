"""Columns by the activations: the model is calibrated first, and its shards are converted as they pass.

Owns how a calibration and a conversion share the shards of one source, so that each is brought here once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from int8cli.calibration.calibrate import CalibrateOptions, CalibrationObserver, Companion, calibrate
from int8cli.calibration.text import Text
from int8cli.calibration.torch_threads import torch_threads
from int8cli.checkpoint.source import LocalFile, Source
from int8cli.columns import TakeShard
from int8cli.columns.from_statistics import StatisticsColumns
from int8cli.outlier_statistics import SiteStatistics
from int8cli.results import StoredColumns
from int8cli.survey import Survey


@dataclass(frozen=True, slots=True)
class CalibrationRun:
    """A calibration to be made. `model_threads`: torch's own threads while the model runs; a conversion has its own."""

    text: Text
    options: CalibrateOptions
    model_threads: int = 1


class CalibratedColumns:
    """Columns told by running the model; see StatisticsColumns for the choice."""

    def __init__(self, source: Source, survey: Survey, run: CalibrationRun, observer: CalibrationObserver) -> None:
        self._source, self._survey, self._run, self._observer = source, survey, run, observer
        self._columns = StatisticsColumns(survey, run.options.stored_columns)

    def bring(self, take: TakeShard, require_room: Callable[[int], None]) -> None:
        """Run the model; each shard is taken once all that is wanted of it has been read. Raises as `calibrate`."""
        companion = _Passing(self._columns, take, require_room)
        with torch_threads(self._run.model_threads):
            calibrate(self._source, self._survey, self._run.text, self._run.options, self._observer, companion)

    def columns_of(self, shard: str, local: LocalFile) -> Mapping[str, StoredColumns]:
        return self._columns.columns_of(shard, local)


class _Passing(Companion):
    """What a conversion does while a calibration has shards here."""

    def __init__(self, columns: StatisticsColumns, take: TakeShard, require_room: Callable[[int], None]) -> None:
        self._columns, self._take, self._require_room = columns, take, require_room

    def starting(self, held_bytes: int) -> None:
        self._require_room(held_bytes)

    def learnt(self, sites: tuple[SiteStatistics, ...]) -> None:
        self._columns.learn(sites)

    def leaving(self, shard: str, local: LocalFile) -> None:
        with torch_threads(1):
            self._take(shard, local)
