"""What the inputs of linear layers tell: statistics by dimension, outlier features, and the error int8 will make.

Owns the definitions: which dimensions are systematic outlier features [LLM.int8(), section 4], which values are massive
activations [Sun et al. 2024, arXiv:2402.17762], what output error a weight's rounding causes given the second moments
of its inputs, and which input columns are worth keeping exact. Knows no model, no layer name and no file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int8cli.llm_int8.quantize import INT8_MAX, BlockQuantizer

THRESHOLD = 6.0
LAYER_SHARE = 0.25
POSITION_SHARE = 0.06
# A value is massive from 100 on, where it is also a thousand times the median magnitude around it [Sun et al. 2024].
MASSIVE_MAGNITUDE = 100.0
MASSIVE_RATIO = 1000.0

_SHARE_SLACK = 1e-6  # shares are float32
_CHUNK_ELEMENTS = 1 << 21
_MEDIAN_SAMPLE = 1 << 16
# The error of rounding to steps of size 1 is spread evenly over [-1/2, 1/2]: its mean square is 1/12.
_ROUNDING_VARIANCE = 1.0 / 12.0


class NonFiniteInputError(ValueError):
    """An input holds NaN or an infinity, first at (`position`, `dimension`)."""

    def __init__(self, position: int, dimension: int, value: float) -> None:
        super().__init__(f"{value} at position {position}, dimension {dimension}")
        self.position, self.dimension, self.value = position, dimension, value


@dataclass(frozen=True, slots=True)
class InputSummary:
    """Statistics of all inputs that one site has seen.

    By dimension, each (features,): `minimum`, `maximum`, `absmax_later` (largest |x| without the first position of
    each sequence), `mean_square` and `share_over` (share of positions with |x| >= threshold) in float32;
    `absmax_position`, where in its sequence the largest |x| stood, in int32. `median` is that of |x| over all
    dimensions, from a sample; `mean_squared_rowmax` the mean square of each position's largest |x|.
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
        """Take in a batch of inputs (..., positions, features), in any float dtype, each sequence from its start.

        Works in float32 on chunks of a few megabytes. Raises NonFiniteInputError at the first NaN or infinity.
        """
        length = inputs.shape[-2] if inputs.dim() > 1 else 1
        rows = inputs.reshape(-1, inputs.shape[-1])  # (positions of all sequences, features)
        step = max(1, _CHUNK_ELEMENTS // max(1, rows.shape[1]))
        for start in range(0, rows.shape[0], step):
            self._take(rows[start : start + step].float(), start, length)
        if rows.numel():
            stride = max(1, rows.numel() // _MEDIAN_SAMPLE)
            self._sum_medians += float(rows.reshape(-1)[::stride].abs().median())
            self._medians += 1

    def _take(self, chunk: Tensor, start: int, length: int) -> None:
        """A chunk of float32 rows, the first of which is row `start` of a batch of sequences of `length`."""
        magnitude = chunk.abs()  # (rows, features)
        rowmax = magnitude.amax(dim=1)
        if not bool(torch.isfinite(rowmax).all()):
            _raise_first_non_finite(chunk, start, length)
        torch.minimum(self._minimum, chunk.amin(dim=0), out=self._minimum)
        torch.maximum(self._maximum, chunk.amax(dim=0), out=self._maximum)
        self._place_absmax(magnitude, start, length)
        self._sum_squares += chunk.square().sum(dim=0).double()
        self._over += (magnitude >= self._threshold).sum(dim=0)
        self._positions += chunk.shape[0]
        self._sum_squared_rowmax += float(rowmax.double().square().sum())
        magnitude[-start % length :: length] = 0.0  # the first position of each sequence
        torch.maximum(self._absmax_later, magnitude.amax(dim=0), out=self._absmax_later)

    def _place_absmax(self, magnitude: Tensor, start: int, length: int) -> None:
        """Note where the dimensions stood that are larger here than ever before."""
        risen = (magnitude.amax(dim=0) > self._absmax).nonzero().squeeze(1)
        if risen.numel():
            largest, row = magnitude[:, risen].max(dim=0)
            self._absmax[risen] = largest
            self._absmax_position[risen] = ((row + start) % length).int()

    def summary(self) -> InputSummary:
        """What has been seen so far, on the CPU. Without any input, all figures are 0."""
        count = max(1, self._positions)
        seen = self._positions > 0
        return InputSummary(
            positions=self._positions,
            threshold=self._threshold,
            minimum=(self._minimum if seen else torch.zeros_like(self._minimum)).cpu(),
            maximum=(self._maximum if seen else torch.zeros_like(self._maximum)).cpu(),
            absmax_later=self._absmax_later.cpu(),
            absmax_position=self._absmax_position.cpu(),
            mean_square=(self._sum_squares / count).float().cpu(),
            share_over=(self._over.double() / count).float().cpu(),
            mean_squared_rowmax=self._sum_squared_rowmax / count,
            median=self._sum_medians / max(1, self._medians),
        )


@dataclass(frozen=True, slots=True)
class OutlierFeature:
    """One dimension of the residual stream that carries outliers in many layers, by the paper's criteria.

    `layers` are indices into the layers given; `position_share` is the mean over all sites of the share of positions
    at which it reaches the threshold, `peak_share` the largest of these; `largest` is the largest |x| anywhere.
    """

    dimension: int
    layers: tuple[int, ...]
    layer_share: float
    position_share: float
    peak_share: float
    largest: float
    sign: str


def systematic_features(
    layers: Sequence[Sequence[InputSummary]],
    *,
    layer_share: float = LAYER_SHARE,
    position_share: float = POSITION_SHARE,
) -> tuple[OutlierFeature, ...]:
    """Dimensions with |x| >= threshold in at least `layer_share` of the layers and `position_share` of the positions.

    `layers` holds for each layer the summaries of its norm-fed sites, all over the same index space. A dimension is
    in a layer where one of these sites has it over the threshold anywhere; positions are counted over all sites of all
    layers. The most widespread come first. [LLM.int8(), section 4.1, which leaves out the inputs of the second
    feed-forward layers too]
    """
    if not layers:
        return ()
    by_layer = torch.stack([torch.stack([site.share_over for site in sites]).amax(dim=0) for sites in layers])
    mean_share = torch.stack([site.share_over for sites in layers for site in sites]).double().mean(dim=0)
    present = by_layer > 0  # (layers, features)
    enough = (present.sum(dim=0) >= layer_share * len(layers)) & (mean_share >= position_share - _SHARE_SLACK)
    found = []
    for dimension in enough.nonzero().squeeze(1).tolist():
        where = present[:, dimension].nonzero().squeeze(1).tolist()
        sites = [site for layer in where for site in layers[layer]]
        found.append(
            OutlierFeature(
                dimension=dimension,
                layers=tuple(where),
                layer_share=len(where) / len(layers),
                position_share=float(mean_share[dimension]),
                peak_share=float(by_layer[:, dimension].max()),
                largest=max(float(site.absmax[dimension]) for site in sites),
                sign=_joint_sign([site.sign(dimension) for site in sites]),
            )
        )
    return tuple(sorted(found, key=lambda feature: (-len(feature.layers), -feature.position_share, feature.dimension)))


@dataclass(frozen=True, slots=True)
class MassiveActivation:
    """A dimension that reaches a magnitude far beyond all around it, as a rule at one position only.

    `value` is the extreme, `position` where in its sequence it stood, `later` the largest |x| after the first position.
    """

    dimension: int
    value: float
    position: int
    later: float


def massive_activations(summary: InputSummary) -> tuple[MassiveActivation, ...]:
    """The dimensions with massive activations, largest first: |x| > 100 and > 1000 times the median |x|."""
    absmax = summary.absmax
    massive = absmax > max(MASSIVE_MAGNITUDE, MASSIVE_RATIO * summary.median)
    found = [
        MassiveActivation(
            dimension,
            float(max(summary.maximum[dimension], summary.minimum[dimension], key=abs)),
            int(summary.absmax_position[dimension]),
            float(summary.absmax_later[dimension]),
        )
        for dimension in massive.nonzero().squeeze(1).tolist()
    ]
    return tuple(sorted(found, key=lambda activation: (-abs(activation.value), activation.dimension)))


def column_errors(weight: Tensor) -> tuple[Tensor, float]:
    """What rounding to int8 does to each column of a weight (out, in), and the weight's own size.

    Returns ||dW_:j||² as float32 (in,), with dW = W - data * row_absmax / 127, and ||W||². Works on blocks of rows.
    Raises NonFiniteWeightError, with the row counted in its block.
    """
    out_features, in_features = weight.shape
    errors = torch.zeros(in_features, dtype=torch.float64, device=weight.device)
    rows = max(1, _CHUNK_ELEMENTS // max(1, in_features))
    quantizer = BlockQuantizer(min(rows, max(1, out_features)) * in_features, device=str(weight.device))
    data = torch.empty((min(rows, out_features), in_features), dtype=torch.int8, device=weight.device)
    absmax = torch.empty(min(rows, out_features), device=weight.device)
    sum_squares = 0.0
    for start in range(0, out_features, rows):
        block = weight[start : start + rows].contiguous()
        count = block.shape[0]
        found = quantizer.row_absmax(block)
        sums = quantizer.quantize_and_measure(block, found, data=data[:count], stored_absmax=absmax[:count])
        restored = data[:count].float().mul_((absmax[:count] / INT8_MAX)[:, None])
        errors += restored.sub_(block).square_().sum(dim=0).double()
        sum_squares += sums.sum_squared_weight
    return errors.float(), sum_squares


def predicted_output_error(
    mean_square: Tensor,
    column_error: Tensor,
    output_mean_square: float,
    *,
    mean_squared_rowmax: float = 0.0,
    weight_sum_squares: float = 0.0,
    kept: Sequence[int] = (),
) -> float:
    """Relative error of a linear's output, ||error|| / ||X Wᵀ||, expected when W is int8.

    err² = ( Σ_j E[x_j²] ||dW_:j||² + E[rowmax²] / (127² · 12) · ||W||² ) / E||X Wᵀ||²

    mean_square E[x_j²] and column_error ||dW_:j||² are (in,); `output_mean_square` is the mean over positions of the
    squared length of the output without its bias. The second term is the rounding of the inputs, one scale a token:
    leave the keyword arguments out for inputs in 16 bit. Columns in `kept` are exact and add nothing to the first.
    0 where the output is 0.
    """
    if output_mean_square <= 0.0:
        return 0.0
    parts = mean_square.double() * column_error.double()  # (in,)
    if len(kept):
        parts[torch.as_tensor(list(kept), dtype=torch.long)] = 0.0
    inputs = mean_squared_rowmax * _ROUNDING_VARIANCE / (INT8_MAX * INT8_MAX) * weight_sum_squares
    return math.sqrt((float(parts.sum()) + inputs) / output_mean_square)


def choose_columns(summary: InputSummary, column_error: Tensor, limit: int) -> tuple[int, ...]:
    """The input columns most worth keeping exact, at most `limit`, sorted by index.

    Ranked by E[x_j²] (||dW_:j||² + mean_k ||dW_:k||²): what the rounding of the column adds to the output's error, and
    its part, by its share of the inputs' energy, in the steps that all of a token is rounded to. Ties go to the lower
    index. Columns that were always 0 are never chosen.

    Measured on SmolLM2-135M, 8 columns of each linear, text not used to calibrate, as the divergence from 16 bit in
    nats: 0.0056; by |x| 0.0063, the same without first tokens 0.0075, by |x| and E[x_j²] ||dW_:j||² in turn 0.0060.
    """
    error = column_error.double()
    score = summary.mean_square.double() * (error + error.mean())
    order = torch.sort(score, descending=True, stable=True).indices[:limit].tolist()
    return tuple(sorted(column for column in order if float(summary.absmax[column]) > 0.0))


def _joint_sign(signs: Sequence[str]) -> str:
    found = set(signs) - {""}
    return next(iter(found)) if len(found) == 1 else "±" if found else ""


def _raise_first_non_finite(chunk: Tensor, start: int, length: int) -> None:
    row, dimension = (~torch.isfinite(chunk)).nonzero()[0].tolist()
    raise NonFiniteInputError((row + start) % length, dimension, float(chunk[row, dimension]))
