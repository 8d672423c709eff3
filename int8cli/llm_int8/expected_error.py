"""The error expected of int8 products, as a function of the exponents of the input columns.

Rounding to steps of size d adds d² / 12 to the mean square. So for linears l that share the inputs of tokens t

    err² = Σ_l ( c Σ_i r_i² · Σ_j m_j / s_j² / 127² + Σ_t v_t g_t² · Σ_j s_j² ||w_j||² / levels² ) / 12, s_j = 2^(k_j/n)

Of an exponent k, n steps are a factor of 2: one or four. r_i = max_j |w_ij| s_j is what row i is scaled by, and g_t
what token t is scaled by once its inputs are divided; m_j = Σ_t v_t x_tj². How much a token counts, v_t, is in
`token_shares`, and how much the first sum does, c, in WEIGHT_ERRORS_COUNT. With c = 1 this is 6 % below to 11 % above
the measured error on SmolLM2-135M, 1 % above it in the median.

With stored columns, a part of the error is that of the product in which they are exact. They add nothing to m, ||w||²
and g there; r is as before, because the int8 weight has all columns.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from int8cli.llm_int8.columns import ROUNDING_VARIANCE
from int8cli.llm_int8.largest import LargestByRow, Part, PartOfMatrix, row_chunks
from int8cli.llm_int8.limits import EXACT_STEPS, Steps
from int8cli.llm_int8.matmul import InputScheme
from int8cli.llm_int8.quantize import INT8_MAX
from int8cli.llm_int8.smoothing import token_shares

# How much more the squared error of the weights counts than that of the inputs. It is the same for all tokens, so it
# adds up where a model takes means over tokens, as attention does; what inputs are rounded by differs from token to
# token. On SmolLM2-135M an error of the weights costs 1.2 to 2 times the KL divergence of an equal error of the inputs.
WEIGHT_ERRORS_COUNT = 3.0
# The share of the product with stored columns in the error, where some are stored.
STORED_COUNTS = 0.25
# A step counts if it gains this share of the error. Less is within the rounding of float32.
_LEAST_GAIN = 1e-6
_LEVELS: dict[InputScheme, float] = {"absmax": INT8_MAX, "zeropoint": 255.0}
_PARTS: dict[InputScheme, tuple[Part, ...]] = {"absmax": ("magnitude",), "zeropoint": ("above", "below")}


@dataclass(frozen=True, slots=True)
class _Product:
    """What the error of one way to compute the product depends on, apart from the weights.

    `mean_square` and `norms` are float64 (linears, columns), `inputs` the parts of the range of each token. `counts` is
    the share of this product in the error.
    """

    mean_square: Tensor
    norms: Tensor
    inputs: Sequence[PartOfMatrix]
    counts: float = 1.0


class ExpectedError:
    """The error expected of the int8 products of a site, as a function of the exponents of its input columns.

    inputs (tokens, in_features) and weights (out_features, in_features), neither smoothed. Without a `scheme` inputs
    stay floats. Columns with the same value in `group`, int64 (in_features,), share an exponent. `steps` of an exponent
    are a factor of 2. `weights_count` is c.

    `columns` is how many exponents there are: one for each column or group.
    """

    def __init__(
        self,
        inputs: Tensor,
        weights: Sequence[Tensor],
        scheme: InputScheme | None,
        group: Tensor | None = None,
        steps: Steps = EXACT_STEPS,
        weights_count: float = WEIGHT_ERRORS_COUNT,
    ) -> None:
        self._scheme, self.steps, self._weights_count = scheme, steps, weights_count
        self.group = None if group is None else _numbered(group)
        self.columns = inputs.shape[1] if self.group is None else int(self.group.max()) + 1
        measured = [_energies(inputs, weight) for weight in weights]
        self._share = torch.stack([token_shares(energies) for energies, _ in measured])  # (linears, tokens)
        self._inputs, self._mean_square = inputs, _sum_squares(inputs, self._share)  # mean square: (linears, in)
        self._norms = torch.stack([norms for _, norms in measured])  # (linears, in)
        self._products = [self._product(without=None)]
        self._weights = [self._gathered(PartOfMatrix(weight, "magnitude")) for weight in weights]

    def with_stored(self, columns: Tensor) -> "ExpectedError":
        """The same, with a share of the product in which some columns, int64 (n,), are exact."""
        both = copy.copy(self)
        (plain,) = self._products
        stored = replace(self._product(columns), counts=STORED_COUNTS)
        both._products = [replace(plain, counts=1.0 - STORED_COUNTS), stored]
        return both

    def of(self, exponents: Tensor) -> float:
        """The expected error, added up over the linears. exponents: int8 (in_features,)."""
        return self.state(exponents).error

    def state(self, exponents: Tensor) -> "ExpectedErrorState":
        """The error at some exponents, int8 (in_features,), from where they can be moved."""
        if self.group is not None:
            first = torch.zeros(self.columns, dtype=exponents.dtype, device=exponents.device)
            exponents = first.scatter(0, self.group, exponents)
        ways = self._products, self._share, self._weights
        return ExpectedErrorState(self._scheme, self.steps, self._weights_count, *ways, exponents)

    @property
    def longest(self) -> int:
        """The most rows of a matrix that a move of a column looks at."""
        inputs = [part for product in self._products for part in product.inputs]
        return max(matrix.values.shape[0] for matrix in (*self._weights, *inputs))

    def _product(self, without: Tensor | None) -> _Product:
        mean_square, norms = self._mean_square, self._norms
        if without is not None:
            mean_square, norms = mean_square.index_fill(1, without, 0.0), norms.index_fill(1, without, 0.0)
        parts = _PARTS[self._scheme] if self._scheme is not None else ()
        ranges = [self._gathered(PartOfMatrix(self._inputs, part, without)) for part in parts]
        return _Product(self._added(mean_square), self._added(norms), ranges)

    def _gathered(self, matrix: PartOfMatrix) -> PartOfMatrix:
        return matrix if self.group is None else matrix.gathered(self.group, self.columns)

    def _added(self, values: Tensor) -> Tensor:
        """The sums of values (linears, in) over each group."""
        if self.group is None:
            return values
        return values.new_zeros((values.shape[0], self.columns)).index_add_(1, self.group, values)


@dataclass(slots=True)
class _Sums:
    """What follows from the exponents of the moment for one product."""

    product: _Product
    moved: Tensor
    energy: Tensor
    tokens: list[LargestByRow]


@dataclass(slots=True)
class ExpectedErrorState:
    """The exponents at one moment, int64 (columns,), the error there, and all sums that it follows from."""

    scheme: InputScheme | None
    steps: Steps
    weights_count: float
    products: Sequence[_Product]
    share: Tensor
    weights: Sequence[PartOfMatrix]
    exponents: Tensor
    error: float = field(init=False)
    _up: Tensor = field(init=False)
    _down: Tensor = field(init=False)
    _rows: list[LargestByRow] = field(init=False)
    _sums: list[_Sums] = field(init=False)

    def __post_init__(self) -> None:
        self.exponents = self.exponents.long().clone()
        octaves = self.exponents.float() / self.steps
        self._up, self._down = torch.exp2(octaves), torch.exp2(-octaves)
        self._rows = [LargestByRow(matrix, self._up) for matrix in self.weights]
        self._sums = [self._first_sums(product) for product in self.products]
        rows = [each.first[:, None] for each in self._rows]
        tokens = [[each.first[:, None] for each in sums.tokens] for sums in self._sums]
        energies = [(sums.moved, sums.energy) for sums in self._sums]
        self.error = float(self._error(rows, tokens, energies))

    def _first_sums(self, product: _Product) -> _Sums:
        moved = (product.mean_square * self._down.double().square()).sum(dim=1, keepdim=True)
        energy = (product.norms * self._up.double().square()).sum(dim=1, keepdim=True)
        return _Sums(product, moved, energy, [LargestByRow(matrix, self._down) for matrix in product.inputs])

    def promising(self, columns: slice, fits: Tensor, stride: int) -> Iterator[tuple[int, int]]:
        """The columns that gain by `stride` steps down or up, seen one by one, and the better move of each.

        `fits` says which columns may be moved down and which up: bool (2, columns).
        """
        moves = (-stride, stride)
        found = torch.stack([self._after(columns, step) for step in moves])  # (2, columns)
        best = torch.where(fits, found, torch.inf).min(dim=0)
        for place in self._gains(best.values).nonzero().squeeze(1).tolist():
            yield columns.start + place, moves[int(best.indices[place])]

    def tried(self, column: int, step: int) -> bool:
        """Move a column by so many steps if that still gains; whether it did."""
        columns = slice(column, column + 1)
        error = self._after(columns, step)
        if not bool(self._gains(error)):
            return False
        number = int(self.exponents[column])
        before, after = 2.0 ** (number / self.steps), 2.0 ** ((number + step) / self.steps)
        self.exponents[column] += step
        self._up[column], self._down[column] = after, 1.0 / after
        for largest in self._rows:
            largest.follow(column, before, after)
        for sums in self._sums:
            sums.moved = sums.moved + sums.product.mean_square[:, columns] * (after**-2 - before**-2)
            sums.energy = sums.energy + sums.product.norms[:, columns] * (after**2 - before**2)
            for largest in sums.tokens:
                largest.follow(column, 1.0 / before, 1.0 / after)
        self.error = float(error)
        return True

    def _gains(self, error: Tensor) -> Tensor:
        return error < self.error * (1.0 - _LEAST_GAIN)

    def _after(self, columns: slice, step: int) -> Tensor:
        """The error if one of the columns were moved by so many steps, for each: float64 (columns,)."""
        factor = 2.0 ** (step / self.steps)
        up, down = self._up[columns].double().square(), self._down[columns].double().square()
        rows = [each.with_factors(columns, self._up[columns] * factor) for each in self._rows]
        tokens, energies = [], []
        for sums in self._sums:
            tokens.append([each.with_factors(columns, self._down[columns] / factor) for each in sums.tokens])
            moved = sums.moved + sums.product.mean_square[:, columns] * down * (factor**-2 - 1.0)
            energies.append((moved, sums.energy + sums.product.norms[:, columns] * up * (factor**2 - 1.0)))
        return self._error(rows, tokens, energies)

    def _error(
        self, rows: Sequence[Tensor], tokens: Sequence[Sequence[Tensor]], energies: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The error of all products: float64 (n,).

        rows: r (out, n) for each linear. For each product, tokens: the parts of g (tokens, n), and energies: the sums
        that r and g are multiplied by, (linears, n) each.
        """
        squares = torch.stack([each.square().sum(dim=0) for each in rows]).double()  # (linears, n)
        error = torch.zeros_like(squares)
        for product, parts, (moved, energy) in zip(self.products, tokens, energies, strict=True):
            error += squares * moved * (product.counts * self.weights_count / (INT8_MAX * INT8_MAX))
            if self.scheme is not None:
                ranges = self.share @ torch.stack(list(parts)).sum(dim=0).double().square()  # (linears, n)
                error += ranges * energy * (product.counts / (_LEVELS[self.scheme] * _LEVELS[self.scheme]))
        return error.sum(dim=0) * ROUNDING_VARIANCE


def _numbered(group: Tensor) -> Tensor:
    """The same groups, numbered from 0: int64 (columns,)."""
    return torch.searchsorted(torch.tensor(sorted(set(group.tolist())), device=group.device), group)


def _energies(inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """||x W^T||² of each token, and ||w_j||² of each column: float64 (tokens,) and (in,)."""
    energies = torch.zeros(inputs.shape[0], dtype=torch.float64, device=inputs.device)
    norms = torch.zeros(inputs.shape[1], dtype=torch.float64, device=inputs.device)
    whole = inputs.float()
    for chunk in row_chunks(weight):
        rows = weight[chunk].float()
        energies += (whole @ rows.t()).double().square().sum(dim=1)
        norms += rows.square().sum(dim=0).double()
    return energies, norms


def _sum_squares(inputs: Tensor, share: Tensor) -> Tensor:
    """Σ_t share_t x_tj², for shares (linears, tokens): float64 (linears, in)."""
    sums = share.new_zeros((share.shape[0], inputs.shape[1]))
    for chunk in row_chunks(inputs):
        sums += share[:, chunk] @ inputs[chunk].double().square()
    return sums
