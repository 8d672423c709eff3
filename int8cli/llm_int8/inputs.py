"""Statistics of the inputs of linear layers, by dimension.

Owns which statistics are collected, and the threshold from which a value is an outlier. Knows no model, layer name or
file.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLD = 6.0
_CHUNK_ELEMENTS = 1 << 21
_MEDIAN_SAMPLE = 1 << 16


class NonFiniteInputError(ValueError):
    """An input contains NaN or an infinity, first at (`position`, `dimension`)."""

    def __init__(self, position: int, dimension: int, value: float) -> None:
        super().__init__(f"{value} at position {position}, dimension {dimension}")
        self.position, self.dimension, self.value = position, dimension, value


@dataclass(frozen=True, slots=True)
class InputSummary:
    """Statistics of all inputs of one site.

    By dimension, each (features,): `minimum`, `maximum`, `absmax_later` (largest |x| without the first position of
    each sequence), `mean_square` and `share_over` (share of positions with |x| >= threshold) in float32, and in int32
    `absmax_position`, the position of the largest |x| in its sequence. `median` is the median of |x| over a sample of
    all dimensions; `mean_squared_rowmax` is the mean square of each position's largest |x|. `smoothed`: of a
    smoothed model.
    """

    positions: int
    threshold: float
    minimum: Tensor
    maximum: Tensor
    absmax_later: Tensor
    absmax_position: Tensor
    mean_square: Tensor
    share_over: Tensor
    mean_squared_rowmax: float
    median: float
    smoothed: bool = False

    @property
    def features(self) -> int:
        return self.minimum.numel()

    @property
    def absmax(self) -> Tensor:
        """Largest |x| of each dimension: float32 (features,)."""
        return torch.maximum(self.maximum.abs(), self.minimum.abs())

    @property
    def share_of_values_over(self) -> float:
        """Share of all values, over positions and dimensions, that reach the threshold."""
        return float(self.share_over.double().mean()) if self.features else 0.0

    def sign(self, dimension: int) -> str:
        """The sign of a dimension's values over the threshold: `+`, `-`, `±` for both, empty for none."""
        above = float(self.maximum[dimension]) >= self.threshold
        below = float(self.minimum[dimension]) <= -self.threshold
        return "±" if above and below else "+" if above else "-" if below else ""


class InputStatistics:
    """Accumulates an InputSummary from batches of inputs. All batches have the same number of features."""

    def __init__(self, features: int, *, threshold: float = THRESHOLD, device: str | torch.device = "cpu") -> None:
        def filled(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((features,), value, dtype=dtype, device=device)

        self._threshold = threshold
        self._minimum, self._maximum = filled(math.inf), filled(-math.inf)
        self._absmax, self._absmax_later = filled(-1.0), filled(0.0)
        self._absmax_position = filled(0, torch.int32)
        self._sum_squares = filled(0.0, torch.float64)
        self._over = filled(0, torch.int64)
        self._positions = 0
        self._sum_squared_rowmax = 0.0
        self._sum_medians, self._medians = 0.0, 0

    def update(self, inputs: Tensor) -> None:
        """Add a batch of inputs (..., positions, features), in any float dtype. Each sequence begins at position 0.

        Works in float32 on chunks of a few megabytes. Raises NonFiniteInputError at the first NaN or infinity.
        """
        length = inputs.shape[-2] if inputs.dim() > 1 else 1
        rows = inputs.reshape(-1, inputs.shape[-1])  # (positions of all sequences, features)
        step = max(1, _CHUNK_ELEMENTS // max(1, rows.shape[1]))
        for start in range(0, rows.shape[0], step):
            self._add(rows[start : start + step].float(), start, length)
        if rows.numel():
            stride = max(1, rows.numel() // _MEDIAN_SAMPLE)
            self._sum_medians += float(rows.reshape(-1)[::stride].abs().median())
            self._medians += 1

    def _add(self, chunk: Tensor, start: int, length: int) -> None:
        """Add a chunk of float32 rows. The first is row `start` of a batch of sequences with `length` rows each."""
        magnitude = chunk.abs()  # (rows, features)
        rowmax = magnitude.amax(dim=1)
        if not bool(torch.isfinite(rowmax).all()):
            _raise_first_non_finite(chunk, start, length)
        torch.minimum(self._minimum, chunk.amin(dim=0), out=self._minimum)
        torch.maximum(self._maximum, chunk.amax(dim=0), out=self._maximum)
        self._update_absmax(magnitude, start, length)
        self._sum_squares += chunk.square().sum(dim=0).double()
        self._over += (magnitude >= self._threshold).sum(dim=0)
        self._positions += chunk.shape[0]
        self._sum_squared_rowmax += float(rowmax.double().square().sum())
        magnitude[-start % length :: length] = 0.0  # the first position of each sequence
        torch.maximum(self._absmax_later, magnitude.amax(dim=0), out=self._absmax_later)

    def _update_absmax(self, magnitude: Tensor, start: int, length: int) -> None:
        """Update the largest |x| of each dimension, and its position, where this chunk exceeds it."""
        risen = (magnitude.amax(dim=0) > self._absmax).nonzero().squeeze(1)
        if risen.numel():
            largest, row = magnitude[:, risen].max(dim=0)
            self._absmax[risen] = largest
            self._absmax_position[risen] = ((row + start) % length).int()

    def summary(self) -> InputSummary:
        """The statistics so far, on the CPU. All figures are 0 if there was no input."""
        count = max(1, self._positions)
        seen = self._positions > 0
        return InputSummary(
            positions=self._positions,
            threshold=self._threshold,
            minimum=(self._minimum if seen else torch.zeros_like(self._minimum)).cpu(),
            maximum=(self._maximum if seen else torch.zeros_like(self._maximum)).cpu(),
            absmax_later=self._absmax_later.cpu(),
            absmax_position=self._absmax_position.cpu(),
            mean_square=(self._sum_squares / count).clamp(max=torch.finfo(torch.float32).max).float().cpu(),
            share_over=(self._over.double() / count).float().cpu(),
            mean_squared_rowmax=self._sum_squared_rowmax / count,
            median=self._sum_medians / max(1, self._medians),
        )


def _raise_first_non_finite(chunk: Tensor, start: int, length: int) -> None:
    row, dimension = (~torch.isfinite(chunk)).nonzero()[0].tolist()
    raise NonFiniteInputError((row + start) % length, dimension, float(chunk[row, dimension]))
