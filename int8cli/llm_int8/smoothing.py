"""Smoothing: input columns divided by scales, and the columns of the weight multiplied by them.

Owns the choice of the exponents, and the range in which scaling by a power of two is exact. An exponent k stands for
x_j / 2^k and w_j * 2^k, which leaves X Wᵀ as it is, bit for bit, as long as nothing overflows or becomes subnormal.
With finer steps (`scales`) each factor is rounded once. [SmoothQuant, Xiao et al. 2023, eq. 4, with such scales]
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8cli.llm_int8.baselines import restored_weight
from int8cli.llm_int8.inputs import InputSummary
from int8cli.llm_int8.limits import EXACT_STEPS, MAX_EXPONENT, Steps
from int8cli.llm_int8.matmul import InputScheme, Int8Weight, llm_int8_linear
from int8cli.llm_int8.quantize import quantize_rowwise
from int8cli.llm_int8.scales import scaled, scales

# How much of a column's range moves from the inputs to the weight: 0.5 shares it equally between both.
ALPHAS = (0.35, 0.5, 0.65, 0.8)
_CHUNK_ELEMENTS = 1 << 21
_FLOAT32_DIGITS = 24


@dataclass(frozen=True, slots=True)
class ExponentRange:
    """The exponents k, from `lowest` to `highest`, for which scaling by 2^k is exact: int64 (n,) each. 0 is in it."""

    lowest: Tensor
    highest: Tensor

    @classmethod
    def unlimited(cls, size: int, device: torch.device) -> "ExponentRange":
        """All exponents that are ever used."""
        limit = torch.full((size,), MAX_EXPONENT, dtype=torch.int64, device=device)
        return cls(-limit, limit)

    def __and__(self, other: "ExponentRange") -> "ExponentRange":
        """The exponents that are in both."""
        return ExponentRange(torch.maximum(self.lowest, other.lowest), torch.minimum(self.highest, other.highest))

    def __neg__(self) -> "ExponentRange":
        """The range of k if this is that of -k."""
        return ExponentRange(-self.highest, -self.lowest)

    def in_steps(self, steps: Steps) -> "ExponentRange":
        """The same range for exponents of which `steps` are a factor of 2."""
        return ExponentRange(self.lowest * steps, self.highest * steps)

    def clamp(self, exponents: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(exponents, self.lowest), self.highest)


def exact_range(rows: Tensor) -> ExponentRange:
    """For each column of floats (rows, columns), the exponents that scale all of its values exactly in their dtype.

    A value stays exact while its lowest set bit is not below the smallest subnormal of the dtype, and while it does not
    overflow. Values that are not finite are ignored: scaling leaves them as they are.
    """
    whole = ExponentRange.unlimited(rows.shape[1], rows.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        whole = whole & _exact_range(rows[start : start + step])
    return whole


def _exact_range(rows: Tensor) -> ExponentRange:
    info = torch.finfo(rows.dtype)
    top = _exponent(torch.tensor(info.max, dtype=torch.float32))
    bottom = _exponent(torch.tensor(info.tiny * info.eps, dtype=torch.float64)) - 1
    values = rows.float()
    matter = torch.isfinite(values) & (values != 0)
    mantissa, exponent = torch.frexp(torch.where(matter, values, 1.0))
    digits = (mantissa * 2.0**_FLOAT32_DIGITS).to(torch.int32).abs()  # at most 2^24: exact
    lowest_bit = _exponents(digits & -digits) - 1 - _FLOAT32_DIGITS + exponent
    lowest = torch.where(matter, bottom - lowest_bit, -MAX_EXPONENT).clamp(-MAX_EXPONENT, 0)
    highest = torch.where(matter, top - exponent, MAX_EXPONENT).clamp(0, MAX_EXPONENT)
    return ExponentRange(lowest.amax(dim=0).long(), highest.amin(dim=0).long())


def normal_range(values: Tensor) -> ExponentRange:
    """For each of some floats (n,), the exponents k for which it stays normal if it is scaled by 2^k, and between.

    Scaling one that is not normal would lose digits in finer steps than whole ones: then only 0.
    """
    normal = _exponent(torch.tensor(torch.finfo(values.dtype).tiny, dtype=torch.float32))
    floats = values.float()
    matter = torch.isfinite(floats) & (floats != 0)
    exponent = torch.where(matter, _exponents(floats), normal + MAX_EXPONENT)
    lowest = (normal - exponent).clamp(-MAX_EXPONENT, 0).long()
    return ExponentRange(lowest, torch.where(exponent < normal, 0, MAX_EXPONENT).long())


def input_range(absmax: Tensor, dtype: torch.dtype) -> ExponentRange:
    """The exponents k for which an input column with this largest |x| (columns,), divided by 2^k, stays normal."""
    info = torch.finfo(dtype)
    top = _exponent(torch.tensor(info.max, dtype=torch.float32))
    normal = _exponent(torch.tensor(info.tiny, dtype=torch.float32))
    exponent = _exponents(torch.where(absmax > 0, absmax, 1.0))
    lowest = torch.where(absmax > 0, exponent - top, -MAX_EXPONENT).clamp(-MAX_EXPONENT, 0)
    highest = torch.where(absmax > 0, exponent - normal, MAX_EXPONENT).clamp(0, MAX_EXPONENT)
    return ExponentRange(lowest.long(), highest.long())


def smoothing_exponents(
    input_absmax: Tensor,
    weight_absmax: Tensor,
    alpha: float,
    allowed: ExponentRange,
    group: Tensor | None = None,
    steps: Steps = EXACT_STEPS,
) -> Tensor:
    """The exponent of each input column: int8 (in_features,), of which `steps` are a factor of 2.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), divided by the geometric mean of all s, as the nearest step, within
    `allowed`, which is in steps too. Columns whose inputs or weights are all 0 get the exponent 0. Both maxima are
    float32 (in_features,); that of the weight is over every linear that shares the input. Columns with the same value
    in `group`, int64 (in_features,), share an exponent.
    """
    if group is not None:
        input_absmax, weight_absmax = _largest(input_absmax, group), _largest(weight_absmax, group)
        allowed = ExponentRange(_largest(allowed.lowest, group), -_largest(-allowed.highest, group))
    known = (input_absmax > 0) & (weight_absmax > 0)
    if not bool(known.any()):
        return torch.zeros_like(input_absmax, dtype=torch.int8)
    logarithm = alpha * input_absmax.double().log2() - (1.0 - alpha) * weight_absmax.double().log2()
    logarithm = logarithm - logarithm[known].mean()
    exponents = torch.where(known, logarithm * steps, 0.0).round().long()
    return allowed.clamp(exponents).to(torch.int8)


def smoothed_summary(summary: InputSummary, exponents: Tensor, steps: Steps) -> InputSummary:
    """The statistics of the divided inputs, by dimension. Figures over all dimensions are those of the originals."""
    factors = scales(exponents, steps).reciprocal()
    return replace(
        summary,
        minimum=summary.minimum * factors,
        maximum=summary.maximum * factors,
        absmax_later=summary.absmax_later * factors,
        mean_square=summary.mean_square * factors * factors,
        smoothed=True,
    )


def column_absmax(weights: Sequence[Tensor]) -> Tensor:
    """The largest |w| of each input column over several weights (out, in_features): float32 (in_features,)."""
    found = [torch.maximum(weight.amax(dim=0), -weight.amin(dim=0)).float() for weight in weights]
    return torch.stack(found).amax(dim=0)


def smoothed_output_error(
    inputs: Tensor, weight: Tensor, exponents: Tensor, scheme: InputScheme | None, steps: Steps = EXACT_STEPS
) -> float:
    """Σ_t v_t ||error_t||² of the int8 product of the smoothed inputs and weight, with v of `token_shares`.

    inputs (tokens, in_features) and weight (out_features, in_features), neither smoothed yet; exponents are those of
    the input columns. Without a `scheme` the inputs stay floats. Works on blocks of rows.
    """
    divided = scaled(inputs, steps, columns=exponents, undo=True)
    errors, energies = (torch.zeros(len(inputs), dtype=torch.float64, device=inputs.device) for _ in range(2))
    whole = inputs.float()
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step]
        exact = whole @ rows.float().t()  # (tokens, rows)
        data, row_absmax = quantize_rowwise(scaled(rows, steps, columns=exponents))
        if scheme is None:
            product = divided.float() @ restored_weight(data, row_absmax, torch.float32).t()
        else:
            product = llm_int8_linear(divided, Int8Weight.of(data, row_absmax), scheme)
        errors += (product - exact).square_().sum(dim=1, dtype=torch.float64)
        energies += exact.square_().sum(dim=1, dtype=torch.float64)
    return float((token_shares(energies) * errors).sum())


def token_shares(energies: Tensor) -> Tensor:
    """How much the squared error of a token's output counts, by ||y_t||² of the tokens: float64 (tokens,).

    v_t = ( 1 / (T ||y_t||²) + 1 / Σ_u ||y_u||² ) / 2: half of it is the mean of the errors relative to each token's
    output, half the error relative to all of it. By the first half alone, a token with a massive activation is one of
    many. But all others attend to it, and what an error costs does not depend on the size of the output that it is in.
    By the second half alone, such a token is all that counts. Tokens whose output is 0 do not count.
    """
    counted = energies > 0.0
    if not bool(counted.any()):
        return torch.zeros_like(energies)
    each = torch.where(counted, 1.0 / torch.where(counted, energies, 1.0), 0.0) / len(energies)
    return (each + counted / energies[counted].sum()) / 2.0


def _largest(values: Tensor, group: Tensor) -> Tensor:
    """For each element the largest value of its group."""
    size = int(group.max()) + 1 if group.numel() else 0
    pooled = torch.zeros(size, dtype=values.dtype, device=values.device)
    return pooled.scatter_reduce(0, group, values, "amax", include_self=False)[group]


def _exponents(values: Tensor) -> Tensor:
    """e with 2^(e-1) <= |v| < 2^e for each value: int32."""
    return torch.frexp(values.float())[1]


def _exponent(value: Tensor) -> int:
    return int(torch.frexp(value)[1])
