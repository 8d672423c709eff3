"""The LLM.int8() product X Wᵀ, and the vector-wise product without outlier columns [LLM.int8(), sections 2 and 3].

Owns how inputs are quantized at run time and how an integer product becomes a float one. Integer products are exact
on every path: accumulated in int32, or in float64 where int32 could overflow, never in float32.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from int8cli.llm_int8.quantize import INT8_MAX

InputScheme = Literal["absmax", "zeropoint"]
DEFAULT_INPUTS: InputScheme = "zeropoint"

# The largest in_features for which a sum of products of two int8 values always fits into int32.
_INT32_SAFE_FEATURES = (2**31 - 1) // (128 * 128)
# The same if a zero point was subtracted from one side, whose values are then from -255 to 255.
_INT32_SAFE_OFFSET_FEATURES = (2**31 - 1) // (255 * 128)
# CUDA's integer product needs more than 16 rows, and multiples of 8 for the other two sizes.
_CUDA_MIN_ROWS = 17
_CUDA_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Int8Input:
    """Inputs of a linear layer in int8: x ≈ (data - zero_point) * step, with one step and zero point for each token.

    data: int8 (tokens, in_features); step and zero_point: float32 (tokens,), zero_point holding whole numbers.
    """

    data: Tensor
    step: Tensor
    zero_point: Tensor


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A linear weight in int8, w ≈ data * row_absmax / 127, and its outlier columns in 16 bit.

    data: int8 (out_features, in_features); row_absmax: float32 (out_features,); row_sums: int32 (out_features,), the
    sums of the rows of data; outlier_cols: int64 (k,), sorted; outlier_weight: (out_features, k) in the source's dtype,
    exact. Without outlier columns k is 0.
    """

    data: Tensor
    row_absmax: Tensor
    row_sums: Tensor
    outlier_cols: Tensor
    outlier_weight: Tensor

    @classmethod
    def of(
        cls,
        data: Tensor,
        row_absmax: Tensor,
        outlier_cols: Tensor | None = None,
        outlier_weight: Tensor | None = None,
    ) -> "Int8Weight":
        """From the tensors of a checkpoint and its sidecar. Without a sidecar there are no outlier columns."""
        if outlier_cols is None or outlier_weight is None:
            outlier_cols = torch.empty(0, dtype=torch.int64, device=data.device)
            outlier_weight = row_absmax.new_empty(data.shape[0], 0)
        return cls(data, row_absmax, data.sum(dim=1, dtype=torch.int32), outlier_cols.long(), outlier_weight)


def quantize_tokens(inputs: Tensor, scheme: InputScheme) -> Int8Input:
    """Quantize inputs (tokens, in_features) with one scale for each token. A token of zeros stays zero.

    `absmax` maps [-max|x|, max|x|] to [-127, 127] [eq. 1]; `zeropoint` maps [min(x, 0), max(x, 0)] to [-128, 127]
    with an offset, so that inputs which are not centred on zero use the whole range [eq. 2 to 5].
    """
    values = inputs.float()
    if scheme == "absmax":
        step = values.abs().amax(dim=1) / INT8_MAX
        zero_point = torch.zeros_like(step)
    else:
        low, high = values.amin(dim=1).clamp(max=0.0), values.amax(dim=1).clamp(min=0.0)
        step = zero_point_step(low, high)
        zero_point = torch.round(-128.0 - low / step).masked_fill_(step == 0, 0.0)
    scaled = values / step.masked_fill(step == 0, 1.0)[:, None] + zero_point[:, None]
    return Int8Input(scaled.round_().clamp_(-128, 127).to(torch.int8), step, zero_point)


def zero_point_step(low: Tensor, high: Tensor) -> Tensor:
    """(high - low) / 255, the step that maps [low, high] to [-128, 127], even if high - low overflows float32.

    low <= 0 <= high, float32 of one shape. Both are halved first, which is exact except for subnormals.
    """
    return (0.5 * high - 0.5 * low) / 127.5


def int8_product(left: Tensor, right: Tensor) -> Tensor:
    """left (tokens, in) times right (out, in) transposed, both int8: exact, int32 (tokens, out).

    Beyond 131,071 in_features, where int32 may overflow, the result is float64, exact up to 2^53. Both may have any
    strides.
    """
    if left.shape[1] > _INT32_SAFE_FEATURES:
        return left.double() @ right.double().t()
    if left.shape[1] == 1:  # torch's product on CPU misreads a transposed (out, 1): see _row_major
        return left.int() * right.t()
    left, right = _row_major(left), _row_major(right)
    if left.device.type != "cuda":
        return torch._int_mm(left, right.t())
    tokens, out_features = left.shape[0], right.shape[0]
    left = _padded(left, max(tokens, _CUDA_MIN_ROWS), _multiple(left.shape[1]))
    right = _padded(right, _multiple(out_features), _multiple(right.shape[1]))
    return torch._int_mm(left, right.t())[:tokens, :out_features]


def vectorwise_linear(inputs: Int8Input, weight: Int8Weight) -> Tensor:
    """X Wᵀ with all columns in int8, one scale for each token and each row: float32 (tokens, out_features).

    The zero points are subtracted exactly, in whole numbers: (q - z) · w = q · w - z * sum(w). The rest rounds four
    times in float32: that number, the step of the weight, and two products. The relative error of the result is at most
    4 * 2^-24.
    """
    product = int8_product(inputs.data, weight.data)
    whole = torch.int32 if inputs.data.shape[1] <= _INT32_SAFE_OFFSET_FEATURES else torch.float64
    offsets = inputs.zero_point.to(whole)[:, None] * weight.row_sums.to(whole)[None]
    scaled = offsets.neg_().add_(product).float()
    scaled *= (weight.row_absmax / INT8_MAX)[None]  # first: the product could overflow with the largest inputs
    scaled *= inputs.step[:, None]
    return scaled


def llm_int8_linear(inputs: Tensor, weight: Int8Weight, scheme: InputScheme) -> Tensor:
    """X Wᵀ with the weight's outlier columns in 16 bit and all others in int8: float32 (tokens, out_features).

    The outlier columns of X are removed before a token's scale is computed, so that they do not enlarge it. They are
    multiplied by the exact columns of W in float32. [LLM.int8(), eq. 8, with stored columns]
    """
    columns = weight.outlier_cols
    if not columns.numel():
        return vectorwise_linear(quantize_tokens(inputs, scheme), weight)
    regular = inputs.index_fill(1, columns, 0.0)
    product = vectorwise_linear(quantize_tokens(regular, scheme), weight)
    return product + inputs[:, columns].float() @ weight.outlier_weight.float().t()


def _row_major(matrix: Tensor) -> Tensor:
    """The matrix with the strides (columns, 1), copied only if it has others.

    `torch._int_mm` on CPU infers from the strides what is transposed. It returns uninitialized memory for a left side
    that is transposed, for a single row with the strides (1, 1), and for a right side with a single column.
    """
    return matrix if matrix.stride() == (matrix.shape[1], 1) else matrix.reshape(-1).view(matrix.shape)


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix padded with zeros below and to the right. They add nothing to a product."""
    if matrix.shape == (rows, columns):
        return matrix
    padded = matrix.new_zeros(rows, columns)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def _multiple(size: int) -> int:
    return -(-size // _CUDA_MULTIPLE) * _CUDA_MULTIPLE
