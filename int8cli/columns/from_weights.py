"""Columns from the weights alone: the suspects in the shards read so far, for models that cannot be run.

Owns the pass over each shard, before it is converted, that reads the norms and the weights that write into the residual
stream, and the state on disk from which a later run knows the shards that were already removed. Work that needs torch
is a task for a process that has torch.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from uuid import uuid4

from int8cli.checkpoint.source import LocalFile, Source
from int8cli.checkpoint.tensor import ShardContents
from int8cli.columns.wanted import ColumnStrategy, ColumnsWanted
from int8cli.conversion.column_source import ColumnSource, RunTask
from int8cli.errors import NoSuspectsError, SavedStateError
from int8cli.outliers.residual_stream import ResidualStream
from int8cli.planning.output_files import sidecar_bytes
from int8cli.planning.survey import Survey
from int8cli.records.conversion import FROM_WEIGHTS, Settings
from int8cli.results.stored_columns import StoredColumn, StoredColumns
from int8cli.workers.processes import OnBytes


def strategy_from_weights(
    wanted: ColumnsWanted,
    source: Source,
    survey: Survey,
    settings: Settings,
    counts: dict[str, int],
    state_directory: Path,
) -> ColumnStrategy:
    """`counts` are those of `counts_from_weights`. Raises NoSuspectsError if there are none."""
    if not counts:
        raise NoSuspectsError(
            "cannot find outlier columns from the weights: no linear layer after a norm is recognised by its name",
            hint="Run the model instead.",
        )
    return ColumnStrategy(
        replace(survey, stored_counts=counts),
        replace(settings, outliers=FROM_WEIGHTS, outlier_columns=wanted.limit),
        lambda progress: SuspectColumns(source, survey, wanted.limit, state_directory / "suspects"),
    )


def counts_from_weights(survey: Survey, limit: int) -> dict[str, int]:
    """How many columns each tensor gets. Only linears after a norm get any; the weights say nothing about others."""
    stream = ResidualStream.of(survey)
    return {each.spec.name: min(limit, stream.width) for each in survey.plan.quantized if stream.feeds(each)}


class SuspectColumns(ColumnSource):
    """The most suspect dimensions of the residual stream, from all shards up to the requested one.

    `state_directory` has the figures of each scanned shard; the caller removes it after the conversion. An earlier
    shard without readable figures is fetched and scanned again.
    """

    def __init__(self, source: Source, survey: Survey, limit: int, state_directory: Path) -> None:
        self._source, self._survey, self._limit = source, survey, limit
        self._stream = ResidualStream.of(survey)
        self._counts = counts_from_weights(survey, limit)
        self._places = {contents.file_name: place for place, contents in enumerate(survey.shards)}
        self._seen = 0  # shards, from the first on, whose figures are there
        self._figures = _Figures(state_directory, pickle.dumps(self._stream), _new_key())

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        """Only what the shards before it hold counts, whatever else has been seen: a run that resumes chooses alike."""
        place = self._places[shard]
        for earlier in range(self._seen, place):
            self._look_again(earlier, run)
        if place < self._seen:  # its first copy was not what the Hub published
            self._figures = replace(self._figures, key=_new_key())
        self._look(place, local, run)
        self._seen = max(self._seen, place + 1)
        decisions = [self._survey.decisions[each.spec.name] for each in self._survey.shards[place].tensors]
        wanted = [each for each in decisions if each.spec.name in self._counts]
        if not wanted:
            return {}
        found = run(partial(_suspects, self._figures, place + 1, self._limit))
        columns = tuple(StoredColumn(index, suspicion=score) for index, score in found)
        return {
            each.spec.name: StoredColumns(FROM_WEIGHTS, columns, sidecar_bytes(each, len(columns))) for each in wanted
        }

    def _look(self, place: int, local: LocalFile, run: RunTask) -> None:
        """Whatever is saved of it: that may be of a copy whose digest proved to be wrong."""
        contents = self._survey.shards[place]
        run(partial(_scan_one, self._stream.within(contents), contents, local, self._figures.path(place)))

    def _look_again(self, place: int, run: RunTask) -> None:
        """At a shard that an earlier run has converted, unless what that one saw can be read."""
        if not run(partial(_can_be_read, self._figures.path(place))):
            with self._source.fetch(self._survey.shards[place].file_name) as local:
                self._look(place, local, run)


@dataclass(frozen=True, slots=True)
class _Figures:
    """Where the figures of each shard are, for the process that needs them.

    `stream` is a pickled ResidualStream: a process that has it already does not unpickle its many tensors again. `key`
    is another one for each conversion, and after figures were replaced.
    """

    directory: Path
    stream: bytes
    key: str

    def path(self, place: int) -> Path:
        return self.directory / f"{place}.safetensors"


class _Scan:
    """What one process has made of the figures so far: it reads each file of them once."""

    def __init__(self, figures: _Figures) -> None:
        from int8cli.outliers.suspects import SuspectScan

        self._figures, self._count = figures, 0
        self._scan = SuspectScan(pickle.loads(figures.stream))

    def suspects(self, count: int, most: int) -> tuple[tuple[int, float], ...]:
        """By the first `count` shards, which are more each time."""
        from int8cli.outliers.suspects import load_figures

        for place in range(self._count, count):
            self._scan.add(load_figures(self._figures.path(place)))
            self._count = place + 1
        return self._scan.suspects(most)


# The scan of the conversion at work: without it, each shard would read the figures of all shards before it.
_scan = lru_cache(maxsize=1)(_Scan)


def _new_key() -> str:
    return uuid4().hex


# Tasks: they run in a process that has torch, and import it there.


def _scan_one(stream: ResidualStream, contents: ShardContents, local: LocalFile, path: Path, on_bytes: OnBytes) -> None:
    from int8cli.outliers.suspects import SuspectScan, save_figures

    scan = SuspectScan(stream, lambda: on_bytes(contents.file_name, "", 0))
    save_figures(scan.scan(contents, local), path)


def _can_be_read(path: Path, on_bytes: OnBytes) -> bool:
    from int8cli.outliers.suspects import load_figures

    try:
        load_figures(path)
    except SavedStateError:
        return False
    return True


def _suspects(figures: _Figures, count: int, most: int, on_bytes: OnBytes) -> tuple[tuple[int, float], ...]:
    return _scan(figures).suspects(count, most)
