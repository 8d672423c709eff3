"""Columns that a conversion stores in several blocks: the outlier features, as far as a report shows them."""

from dataclasses import dataclass

from int8cli.report.layer_roles import OUTSIDE, places_by_name
from int8cli.results.conversion import ConversionReport
from int8cli.results.stored_columns import StoredColumn


@dataclass(frozen=True, slots=True)
class RepeatedColumn:
    """An input column of one role that is stored in several blocks. Figures are None where they are unknown."""

    role: str
    column: int
    blocks: tuple[int, ...]
    absmax: float | None
    mean_share: float | None


def repeated_columns(report: ConversionReport) -> list[RepeatedColumn]:
    """The columns that are stored in at least two blocks, those in the most blocks first."""
    layers = [layer for layer in report.layers if layer.stored]
    members: dict[tuple[str, int], dict[int, list[StoredColumn]]] = {}
    for layer, place in zip(layers, places_by_name([layer.name for layer in layers]), strict=True):
        if place.role != OUTSIDE:
            for column in layer.stored.columns if layer.stored else ():
                blocks = members.setdefault((place.role, column.index), {})
                blocks.setdefault(place.number, []).append(column)
    found = [_repeated(role, index, blocks) for (role, index), blocks in members.items() if len(blocks) > 1]
    return sorted(found, key=lambda each: (-len(each.blocks), each.role, each.column))


def _repeated(role: str, index: int, blocks: dict[int, list[StoredColumn]]) -> RepeatedColumn:
    columns = [column for _, group in sorted(blocks.items()) for column in group]
    largest = [column.absmax for column in columns if column.absmax is not None]
    shares = [column.error_share for column in columns if column.error_share is not None]
    mean = sum(shares) / len(shares) if shares else None
    return RepeatedColumn(role, index, tuple(sorted(blocks)), max(largest, default=None), mean)
