"""Columns by the weights alone: the suspects of the layers seen so far, for want of activations.

Owns the one pass over each shard that looks at norms and at what is written into the residual stream, before the shard
is converted, and the state on disk by which a later run knows what was in shards that have gone.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

from int8cli.checkpoint.source import LocalFile, Source
from int8cli.columns import FROM_WEIGHTS, TakeShard
from int8cli.columns.from_statistics import sidecar_bytes
from int8cli.results import StoredColumn, StoredColumns
from int8cli.survey import Survey
from int8cli.weight_suspects import SuspectScan, feeds_from_norm, hidden_size, keep_figures, recall_figures


def counts_from_weights(survey: Survey, limit: int) -> dict[str, int]:
    """How many columns each tensor gets: those of linears that a norm feeds; the weights say nothing of the others."""
    width = hidden_size(survey)
    return {each.spec.name: min(limit, width) for each in survey.plan.quantized if feeds_from_norm(each, width)}


class SuspectColumns:
    """The most suspect dimensions of the residual stream, by all shards up to the one asked for.

    `kept_in` holds what was seen of each shard; the caller removes it when the conversion is finished. A shard before
    the one asked for, of which nothing is kept, is brought here to be looked at again.
    """

    def __init__(self, source: Source, survey: Survey, limit: int, kept_in: Path) -> None:
        self._source, self._survey, self._limit, self._kept_in = source, survey, limit, kept_in
        self._counts = counts_from_weights(survey, limit)
        self._order = [layout.file_name for layout in survey.layouts]
        self._layouts = {layout.file_name: layout for layout in survey.layouts}

    def bring(self, take: TakeShard, require_room: Callable[[int], None]) -> None:
        pass

    def columns_of(self, shard: str, local: LocalFile) -> Mapping[str, StoredColumns]:
        """Only what the shards before it hold counts, whatever else has been seen: a run that goes on chooses alike."""
        layout = self._layouts[shard]
        wanted = [self._survey.decisions[each.spec.name] for each in layout.tensors]
        wanted = [each for each in wanted if each.spec.name in self._counts]
        scan = SuspectScan(self._survey)
        for name in self._order[: self._order.index(shard) + 1]:
            scan.add(self._figures(scan, name, local if name == shard else None))
        if not wanted:
            return {}
        columns = tuple(StoredColumn(index, suspicion=score) for index, score in scan.suspects(self._limit))
        return {
            each.spec.name: StoredColumns(FROM_WEIGHTS, columns, sidecar_bytes(each, len(columns))) for each in wanted
        }

    def _figures(self, scan: SuspectScan, shard: str, local: LocalFile | None) -> Mapping[str, Tensor]:
        """What was or is now seen of a shard, kept for the shards after it."""
        path = self._figures_path(shard)
        figures = recall_figures(path)
        if figures is None:
            with nullcontext(local) if local is not None else self._source.fetch(shard) as here:
                figures = scan.look_at(self._layouts[shard], here)
            keep_figures(figures, path)
        return figures

    def _figures_path(self, shard: str) -> Path:
        return self._kept_in / f"{self._order.index(shard)}.safetensors"
