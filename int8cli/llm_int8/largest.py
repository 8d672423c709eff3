"""The largest value in each row of a matrix whose columns are scaled, kept up while the scales change one by one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Part = Literal["magnitude", "above", "below"]
_CHUNK_ELEMENTS = 1 << 21


@dataclass(frozen=True, slots=True)
class PartOfMatrix:
    """A matrix (rows, columns) in any float dtype, of which one part counts, as floats of 0 or more.

    The part is the magnitude of a value, or how far it is above or below zero. Columns in `without`, int64 (n,), count
    as 0.
    """

    values: Tensor
    part: Part
    without: Tensor | None = None

    def columns(self, columns: slice) -> Tensor:
        """Neighbouring columns: float32 (rows, columns)."""
        found = self._counted(self.values[:, columns])
        if self.without is not None:
            inside = (self.without >= columns.start) & (self.without < columns.stop)
            found[:, self.without[inside] - columns.start] = 0.0
        return found

    def rows(self, rows: Tensor) -> Tensor:
        """float32 (rows, columns)."""
        found = self._counted(self.values[rows])
        if self.without is not None:
            found[:, self.without] = 0.0
        return found

    def gathered(self, group: Tensor, count: int) -> "PartOfMatrix":
        """The matrix with one column for each of `count` groups, which has the largest of its columns.

        group: the number of each column's group, int64 (columns,).
        """
        found = torch.zeros((self.values.shape[0], count), device=self.values.device)
        for rows in row_chunks(self.values):
            counted = self.rows(torch.arange(rows.start, rows.stop, device=self.values.device))
            found[rows].scatter_reduce_(1, group.expand(len(counted), -1), counted, "amax")
        return PartOfMatrix(found, "magnitude")

    def _counted(self, values: Tensor) -> Tensor:
        values = values.float()
        if self.part == "magnitude":
            return values.abs()
        return (values if self.part == "above" else -values).clamp_min(0.0)


class LargestByRow:
    """The largest value in each row of a matrix whose columns are scaled, and the largest of the other columns.

    `first` is the largest, float32 (rows,). `factors` scale the columns, float32 (columns,). The owner changes a
    factor, then calls `follow`.
    """

    def __init__(self, matrix: PartOfMatrix, factors: Tensor) -> None:
        rows, device = matrix.values.shape[0], matrix.values.device
        self._matrix, self._factors = matrix, factors
        self.first, self._second = torch.zeros(rows, device=device), torch.zeros(rows, device=device)
        self._place = torch.zeros(rows, dtype=torch.int64, device=device)
        self._numbers = torch.arange(matrix.values.shape[1], device=device)
        for chunk in row_chunks(matrix.values):
            self._scan(torch.arange(chunk.start, chunk.stop, device=device))

    def with_factors(self, columns: slice, factors: Tensor) -> Tensor:
        """The largest of each row if one of the columns had another factor: (rows, columns)."""
        others = torch.where(self._place[:, None] == self._numbers[columns], self._second[:, None], self.first[:, None])
        return torch.maximum(others, self._matrix.columns(columns) * factors)

    def follow(self, column: int, before: float, after: float) -> None:
        """Take up a new factor of one column."""
        values = self._matrix.columns(slice(column, column + 1))[:, 0]
        old, new = values * before, values * after
        held = self._place == column
        lost = torch.where(held, new < self._second, (old >= self._second) & (new < old))
        risen = ~held & (new > self.first)
        others = torch.where(risen, self.first, torch.maximum(self._second, new))
        self._second = torch.where(held, self._second, others)
        self.first = torch.where(held | risen, new, self.first)
        self._place = torch.where(risen, column, self._place)
        rows = lost.nonzero().squeeze(1)
        step = max(1, _CHUNK_ELEMENTS // max(1, self._matrix.values.shape[1]))
        for start in range(0, rows.numel(), step):
            self._scan(rows[start : start + step])

    def _scan(self, rows: Tensor) -> None:
        scaled = self._matrix.rows(rows).mul_(self._factors)
        found = scaled.topk(min(2, scaled.shape[1]), dim=1)
        self.first[rows], self._place[rows] = found.values[:, 0], found.indices[:, 0]
        self._second[rows] = found.values[:, 1] if scaled.shape[1] > 1 else 0.0


def row_chunks(values: Tensor) -> Iterator[slice]:
    """The rows of a matrix, some at a time."""
    step = max(1, _CHUNK_ELEMENTS // max(1, values.shape[1]))
    for start in range(0, values.shape[0], step):
        yield slice(start, min(values.shape[0], start + step))
