"""Columns from the weights alone: the suspects in the shards read so far, for models that cannot be run.

Owns the pass over each shard, before it is converted, that reads the norms and the weights that write into the residual
stream, and the state on disk from which a later run knows the shards that were already removed. Work that needs torch
is a task for a process that has torch.
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
from int8cli.errors import NoSuspectsError
from int8cli.outliers.residual_stream import ResidualStream
from int8cli.planning.output_files import sidecar_bytes
from int8cli.planning.survey import Survey
from int8cli.records.store import FROM_WEIGHTS, Settings
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
    shard without saved figures is fetched and scanned again.
    """

    def __init__(self, source: Source, survey: Survey, limit: int, state_directory: Path) -> None:
        self._source, self._survey, self._limit, self._state_directory = source, survey, limit, state_directory
        self._stream = ResidualStream.of(survey)
        self._counts = counts_from_weights(survey, limit)
        self._shards = {contents.file_name: contents for contents in survey.shards}
        self._saved: dict[str, Path] = {}

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        """Uses this shard and those before it only, so that a resumed run chooses the same columns."""
        order = list(self._shards)
        saved = [self._scanned(name, local if name == shard else None, run) for name in order[: order.index(shard) + 1]]
        decisions = [self._survey.decisions[each.spec.name] for each in self._shards[shard].tensors]
        wanted = [each for each in decisions if each.spec.name in self._counts]
        if not wanted:
            return {}
        found = run(partial(_suspects, self._stream, saved, self._limit))
        columns = tuple(StoredColumn(index, suspicion=score) for index, score in found)
        return {
            each.spec.name: StoredColumns(FROM_WEIGHTS, columns, sidecar_bytes(each, len(columns))) for each in wanted
        }

    def _scanned(self, shard: str, local: LocalFile | None, run: RunTask) -> Path:
        """The file with a shard's figures, which is written now if it is missing or the shard is here.

        A shard that is here is always scanned again: its saved figures may come from a copy with a wrong digest.
        """
        if local is None and shard in self._saved:
            return self._saved[shard]
        path = self._state_directory / f"{list(self._shards).index(shard)}.safetensors"
        if local is not None or not (path.exists() and run(partial(_can_be_read, path))):
            contents = self._shards[shard]
            with nullcontext(local) if local is not None else self._source.fetch(shard) as here:
                run(partial(_scan_shard, self._stream.within(contents), contents, here, path))
        self._saved[shard] = path
        return path


# Tasks: they run in a process that has torch, and import it there.


def _scan_shard(
    stream: ResidualStream, contents: ShardContents, local: LocalFile, path: Path, on_bytes: OnBytes
) -> None:
    from int8cli.outliers.suspects import SuspectScan, save_figures

    scan = SuspectScan(stream, lambda: on_bytes(contents.file_name, "", 0))
    save_figures(scan.scan(contents, local), path)


def _can_be_read(path: Path, on_bytes: OnBytes) -> bool:
    from int8cli.outliers.suspects import load_figures

    return load_figures(path) is not None


def _suspects(stream: ResidualStream, saved: list[Path], most: int, on_bytes: OnBytes) -> tuple[tuple[int, float], ...]:
    from int8cli.outliers.suspects import SuspectScan, load_figures

    scan = SuspectScan(stream)
    for path in saved:
        scan.add(load_figures(path) or {})
    return scan.suspects(most)
