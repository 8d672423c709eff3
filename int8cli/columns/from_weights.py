"""Columns from the weights alone: the suspects in the shards read so far, for models that cannot be run.

Before a shard is converted, a scan reads its norms and the weights that write to the residual stream. Owns this scan,
and the figures on disk that tell a resumed run about shards it no longer has. Work that needs torch is a task for a
process that has torch.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from uuid import uuid4

from int8cli.checkpoint.borrowed import with_borrowed
from int8cli.checkpoint.own_files import OwnPath
from int8cli.checkpoint.source import LocalFile, Source
from int8cli.checkpoint.tensor import ShardContents
from int8cli.columns.wanted import ColumnStrategy, ColumnsWanted
from int8cli.conversion.column_source import ColumnSource, RunTask
from int8cli.errors import NoSuspectsError, SavedStateError
from int8cli.outliers.residual_stream import ResidualStream
from int8cli.planning.output_files import sidecar_bytes
from int8cli.planning.survey import Survey
from int8cli.progress import Progress
from int8cli.records.conversion import FROM_WEIGHTS, Settings
from int8cli.results.stored_columns import StoredColumn, StoredColumns
from int8cli.workers.processes import OnBytes


def strategy_from_weights(
    wanted: ColumnsWanted, survey: Survey, settings: Settings, counts: dict[str, int]
) -> ColumnStrategy:
    """`counts` come from `counts_from_weights`. Raises NoSuspectsError if there are none."""
    if not counts:
        raise NoSuspectsError(
            "cannot find outlier columns from the weights: no linear layer after a norm is recognised by its name",
            hint="Run the model instead.",
        )
    return ColumnStrategy(
        replace(survey, stored_counts=counts),
        replace(settings, outliers=FROM_WEIGHTS, outlier_columns=wanted.limit),
        partial(_suspect_columns, survey, wanted.limit),
    )


def _suspect_columns(
    survey: Survey, limit: int, source: Source, state: OwnPath, progress: Progress
) -> "SuspectColumns":
    return SuspectColumns(source, survey, limit, state / "suspects")


def counts_from_weights(survey: Survey, limit: int) -> dict[str, int]:
    """The number of columns for each tensor. Only linears after a norm get any: the weights show nothing for others."""
    stream = ResidualStream.of(survey)
    return {each.spec.name: min(limit, stream.width) for each in survey.plan.quantized if stream.feeds(each)}


class SuspectColumns(ColumnSource):
    """The most suspect dimensions of the residual stream, by all shards up to the requested one.

    `state_directory` contains the figures of each scanned shard. The caller removes it after the conversion. If the
    figures of an earlier shard cannot be read, that shard is fetched and scanned again.
    """

    def __init__(self, source: Source, survey: Survey, limit: int, state_directory: OwnPath) -> None:
        self._source, self._survey, self._limit = source, survey, limit
        self._stream = ResidualStream.of(survey)
        self._counts = counts_from_weights(survey, limit)
        self._places = {contents.file_name: place for place, contents in enumerate(survey.shards)}
        self._seen = 0  # the number of shards, from the first, that have been scanned
        self._figures = _Figures(state_directory, pickle.dumps(self._stream), _new_key())

    def expect(self, shards: Sequence[str], run: RunTask) -> None:
        for shard in shards:
            self._require_figures(self._places[shard], run)

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        """Uses only this shard and those before it, even if later ones were scanned: a resumed run chooses the same."""
        place = self._places[shard]
        for earlier in range(self._seen, place):
            self._require_figures(earlier, run)
        if place < self._seen:  # the first copy of this shard did not match the Hub's digest
            self._figures = replace(self._figures, key=_new_key())
        self._scan(place, local, run)
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

    def _scan(self, place: int, local: LocalFile, run: RunTask) -> None:
        """Scan a shard, even if it has saved figures: those may come from a copy with a wrong digest."""
        contents = with_borrowed(self._source, self._survey.shards[place])
        run(partial(_scan_one, self._stream.within(contents), contents, local, self._figures.file(place)))

    def _require_figures(self, place: int, run: RunTask) -> None:
        """Scan a shard that an earlier run converted, unless the figures from that run can be read."""
        if not run(partial(_can_be_read, self._figures.path(place))):
            with self._source.fetch(self._survey.shards[place].file_name) as local:
                self._scan(place, local, run)


@dataclass(frozen=True, slots=True)
class _Figures:
    """Where to find the figures of each shard. Sent to the processes that need them.

    `stream` is a pickled ResidualStream, so a process that already has it need not unpickle its many tensors again.
    `key` is different for each conversion, and changes if figures are replaced.
    """

    directory: OwnPath
    stream: bytes
    key: str

    def path(self, place: int) -> Path:
        return self.file(place).path

    def file(self, place: int) -> OwnPath:
        return self.directory / f"{place}.safetensors"


class _Scan:
    """The figures that one process has read so far. It reads each file once."""

    def __init__(self, figures: _Figures) -> None:
        from int8cli.outliers.suspects import SuspectScan

        self._figures, self._count = figures, 0
        self._scan = SuspectScan(pickle.loads(figures.stream))  # nosec B301  # of this program, a process on

    def suspects(self, count: int, most: int) -> tuple[tuple[int, float], ...]:
        """The suspects by the first `count` shards. `count` never decreases."""
        from int8cli.outliers.suspects import load_figures

        for place in range(self._count, count):
            self._scan.add(load_figures(self._figures.path(place)))
            self._count = place + 1
        return self._scan.suspects(most)


# The scan of the current conversion. Without it, each shard would read the figures of all shards before it again.
_scan_of = lru_cache(maxsize=1)(_Scan)


def _new_key() -> str:
    return uuid4().hex


# Tasks. They run in a process that has torch.


def _scan_one(
    stream: ResidualStream,
    contents: ShardContents,
    local: LocalFile,
    file: OwnPath,
    on_bytes: OnBytes,
) -> None:
    from int8cli.outliers.suspects import SuspectScan, save_figures

    scan = SuspectScan(stream, lambda: on_bytes(contents.file_name, "", 0))
    save_figures(scan.scan(contents, local), file.path, below=file.below, aside=file.aside)


def _can_be_read(path: Path, on_bytes: OnBytes) -> bool:
    from int8cli.outliers.suspects import load_figures

    try:
        load_figures(path)
    except SavedStateError:
        return False
    return True


def _suspects(figures: _Figures, count: int, most: int, on_bytes: OnBytes) -> tuple[tuple[int, float], ...]:
    return _scan_of(figures).suspects(count, most)
