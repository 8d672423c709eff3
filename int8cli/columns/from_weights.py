"""Columns by the weights alone: the suspects of the layers seen so far, for want of activations.

Owns the one pass over each shard that looks at norms and at what is written into the residual stream, before the shard
is converted, and the state on disk by which a later run knows what was in shards that have gone. What needs torch is a
task for where torch is.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from int8cli.checkpoint.source import LocalFile, Source
from int8cli.checkpoint.tensor import ShardContents
from int8cli.columns.wanted import ColumnStrategy, ColumnsWanted
from int8cli.conversion.column_source import ColumnSource, RunTask
from int8cli.errors import SavedStateError, WeightsTellNothingError
from int8cli.outliers.residual_stream import ResidualStream
from int8cli.planning.output_files import sidecar_bytes
from int8cli.planning.survey import Survey
from int8cli.records.store import FROM_WEIGHTS, Settings
from int8cli.results.stored_columns import StoredColumn, StoredColumns
from int8cli.workers.processes import OnBytes


def strategy_from_weights(
    wanted: ColumnsWanted, source: Source, survey: Survey, settings: Settings, counts: dict[str, int], kept_in: Path
) -> ColumnStrategy:
    """`counts` as `counts_from_weights` has them. Raises WeightsTellNothingError where there are none."""
    if not counts:
        raise WeightsTellNothingError(
            "no linear layers that a norm feeds are recognised by their names, so the weights tell nothing",
            hint="Running the model may tell.",
        )
    return ColumnStrategy(
        replace(survey, stored_counts=counts),
        replace(settings, outliers=FROM_WEIGHTS, outlier_columns=wanted.limit),
        lambda progress: SuspectColumns(source, survey, wanted.limit, kept_in / "suspects"),
    )


def counts_from_weights(survey: Survey, limit: int) -> dict[str, int]:
    """How many columns each tensor gets: those of linears that a norm feeds; the weights say nothing of the others."""
    stream = ResidualStream.of(survey)
    return {each.spec.name: min(limit, stream.width) for each in survey.plan.quantized if stream.feeds(each)}


class SuspectColumns(ColumnSource):
    """The most suspect dimensions of the residual stream, by all shards up to the one asked for.

    `kept_in` holds what was seen of each shard; the caller removes it when the conversion is finished. A shard before
    the one asked for, of which nothing is kept, is brought here to be looked at again.
    """

    def __init__(self, source: Source, survey: Survey, limit: int, kept_in: Path) -> None:
        self._source, self._survey, self._limit, self._kept_in = source, survey, limit, kept_in
        self._stream = ResidualStream.of(survey)
        self._counts = counts_from_weights(survey, limit)
        self._shards = {contents.file_name: contents for contents in survey.shards}
        self._kept: dict[str, Path] = {}

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        """Only what the shards before it hold counts, whatever else has been seen: a run that goes on chooses alike."""
        order = list(self._shards)
        kept = [
            self._looked_at(name, local if name == shard else None, run) for name in order[: order.index(shard) + 1]
        ]
        decisions = [self._survey.decisions[each.spec.name] for each in self._shards[shard].tensors]
        wanted = [each for each in decisions if each.spec.name in self._counts]
        if not wanted:
            return {}
        found = run(partial(_suspects, self._stream, kept, self._limit))
        columns = tuple(StoredColumn(index, suspicion=score) for index, score in found)
        return {
            each.spec.name: StoredColumns(FROM_WEIGHTS, columns, sidecar_bytes(each, len(columns))) for each in wanted
        }

    def _looked_at(self, shard: str, local: LocalFile | None, run: RunTask) -> Path:
        """Where that lies which was or is now seen of a shard, for the shards after it.

        One that is at hand is looked at whatever is kept: that may be of a copy whose digest proved to be wrong.
        """
        if local is None and shard in self._kept:
            return self._kept[shard]
        path = self._kept_in / f"{list(self._shards).index(shard)}.safetensors"
        if local is not None or not (path.exists() and run(partial(_can_be_read, path))):
            contents = self._shards[shard]
            with nullcontext(local) if local is not None else self._source.fetch(shard) as here:
                run(partial(_look_at, self._stream.within(contents), contents, here, path))
        self._kept[shard] = path
        return path


# Tasks: what they import lies where torch is, and comes with it.


def _look_at(stream: ResidualStream, contents: ShardContents, local: LocalFile, path: Path, on_bytes: OnBytes) -> None:
    from int8cli.outliers.suspects import SuspectScan, keep_figures

    scan = SuspectScan(stream, lambda: on_bytes(contents.file_name, "", 0))
    keep_figures(scan.look_at(contents, local), path)


def _can_be_read(path: Path, on_bytes: OnBytes) -> bool:
    from int8cli.outliers.suspects import recall_figures

    try:
        return recall_figures(path) is not None
    except SavedStateError:
        return False


def _suspects(stream: ResidualStream, kept: list[Path], most: int, on_bytes: OnBytes) -> tuple[tuple[int, float], ...]:
    from int8cli.outliers.suspects import SuspectScan, recall_figures

    scan = SuspectScan(stream)
    for path in kept:
        figures = recall_figures(path)
        if figures is None:
            raise SavedStateError(f"{path} is gone, which was written before", hint="Run the same command again.")
        scan.add(figures)
    return scan.suspects(most)
