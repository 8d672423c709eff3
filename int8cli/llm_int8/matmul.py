"""The LLM.int8() product X Wᵀ, and the vector-wise product without outlier columns [LLM.int8(), sections 2 and 3].

Owns how inputs are quantized at run time and how an integer product becomes a float one. Integer products are exact
on every path: accumulated in int32, or in float64 where int32 could overflow, never in float32.

In a decode step, most operations of a linear are on a few numbers, so that their count is what they cost. What depends
on the weight alone is computed once (`Int8Weight.of`); what depends on the inputs is computed in place. In a prefill,
operations count that torch does not vectorise: those of three operands of which one has a number for each token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from int8cli.llm_int8.cpu_product import cpu_product, has_whole_rows
from int8cli.llm_int8.packed_weight import PackedWeight
from int8cli.llm_int8.quantize import INT8_MAX

InputScheme = Literal["absmax", "zeropoint"]
INPUT_SCHEMES: tuple[InputScheme, ...] = ("absmax", "zeropoint")
DEFAULT_INPUTS: InputScheme = "zeropoint"

# The largest in_features for which a sum of products of two int8 values always fits into int32.
_INT32_SAFE_FEATURES = (2**31 - 1) // (128 * 128)
# The same if a zero point was subtracted from one side, whose values are then from -255 to 255.
_INT32_SAFE_OFFSET_FEATURES = (2**31 - 1) // (255 * 128)
# The smallest float32 above 0.
_SMALLEST = 2.0**-149


def _constant(value: float) -> Tensor:
    """A number as a tensor: torch makes one of a Python number in each operation, which takes longer than the rest."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


_HALF, _LOWEST = _constant(0.5), _constant(-128.0)
_ABSMAX_STEPS, _HALF_OF_ALL_STEPS = _constant(INT8_MAX), _constant(127.5)
# CUDA's integer product needs more than 16 rows, and multiples of 8 for the other two sizes.
_CUDA_MIN_ROWS = 17
_CUDA_MULTIPLE = 8
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Int8Input:
    """Inputs of a linear layer in int8: x ≈ (data - zero_point) * step, with one step and zero point for each token.

    data: int8 (tokens, in_features); step and zero_point: float32 (tokens,), zero_point holding whole numbers. The step
    of a token with an infinity or NaN is NaN, and so are its products.
    """

    data: Tensor
    step: Tensor
    zero_point: Tensor


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A linear weight in int8, w ≈ data * step, and its outlier columns in floats.

    data: int8 (out_features, in_features), as a tensor or packed; step: float32 (out_features,), row_absmax / 127;
    row_sums: int32 (out_features,), the sums of the rows of data, in float32 where `data.product` returns that;
    outlier_cols: int64 (k,), sorted; outlier_weight: float32 (k, out_features), exact. Without outlier columns k is 0.
    """

    data: Tensor | PackedWeight
    step: Tensor
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
        *,
        packed: PackedWeight | None = None,
    ) -> "Int8Weight":
        """From the tensors of a checkpoint and its sidecar. Without a sidecar there are no outlier columns.

        outlier_weight is (out_features, k) here, in any float dtype. `packed` is data once more, for fast products.
        """
        if outlier_cols is None or outlier_weight is None:
            outlier_cols = torch.empty(0, dtype=torch.int64, device=data.device)
            outlier_weight = row_absmax.new_empty(data.shape[0], 0)
        row_sums = _row_sums(data)
        return cls(
            data if packed is None else packed,
            row_absmax / INT8_MAX,
            row_sums.float() if packed is not None and packed.in_one_part else row_sums,
            outlier_cols.long(),
            outlier_weight.float().t().contiguous(),
        )


def _row_sums(data: Tensor) -> Tensor:
    """int32 (out_features,). As a product: torch's own sum of int8 makes an int32 copy of all of it first."""
    return int8_product(data.new_ones(1, data.shape[1]), data)[0].to(torch.int32)


def quantize_tokens(inputs: Tensor, scheme: InputScheme) -> Int8Input:
    """Quantize inputs (tokens, in_features) with one scale for each token. A token of zeros stays zero.

    `absmax` maps [-max|x|, max|x|] to [-127, 127] [eq. 1]; `zeropoint` maps [min(x, 0), max(x, 0)] to [-128, 127]
    with an offset, so that inputs which are not centred on zero use the whole range [eq. 2 to 5].
    """
    whole = _quantized_in_place(inputs.to(torch.float32, copy=True), scheme)
    return Int8Input(_int8(whole.values), whole.step.squeeze(1), whole.zero_point.squeeze(1))


@dataclass(frozen=True, slots=True)
class _WholeInput:
    """`Int8Input` before the cast, whose values may be beyond int8 by 1: float32 (tokens, in_features).

    step and zero_point: float32 (tokens, 1).
    """

    values: Tensor
    step: Tensor
    zero_point: Tensor


def _int8(values: Tensor) -> Tensor:
    """Whole numbers in float32, which are lost, as int8."""
    return values.clamp_(-128, 127).to(torch.int8)


def _quantized_in_place(values: Tensor, scheme: InputScheme, *, has_zero: bool = False) -> _WholeInput:
    """Quantize float32 (tokens, in_features), which are lost. `has_zero`: every token is known to hold a zero."""
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)  # (tokens, 1)
    if scheme == "absmax":
        step = _or_nan(torch.maximum(high, low.neg_()).div_(_ABSMAX_STEPS))
        return _WholeInput(values.div_(step.clamp_min(_SMALLEST)).round_(), step, torch.zeros_like(step))
    if not has_zero:
        low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)
    step = _or_nan(zero_point_step(low, high))
    divisor = step.clamp_min(_SMALLEST)  # a token of zeros has the step 0, and becomes its own zero point
    zero_point = (_LOWEST - low.div_(divisor)).round_()
    return _WholeInput(values.div_(divisor).add_(zero_point).round_(), step, zero_point)


def _or_nan(step: Tensor) -> Tensor:
    """The step in place, or NaN if it is infinite: what infinities and NaN are in int8 differs between processors."""
    return step.add_(step, alpha=0.0)


def zero_point_step(low: Tensor, high: Tensor) -> Tensor:
    """(high - low) / 255, the step that maps [low, high] to [-128, 127], even if high - low overflows float32.

    low <= 0 <= high, float32 of one shape. Both are halved first, which is exact except for subnormals.
    """
    return torch.sub(high * _HALF, low, alpha=0.5).div_(_HALF_OF_ALL_STEPS)


def int8_product(left: Tensor, right: Tensor) -> Tensor:
    """left (tokens, in) times right (out, in) transposed, both int8: exact, int32 (tokens, out).

    Beyond 131,071 in_features, where int32 may overflow, the result is float64, exact up to 2^53. Both may have any
    strides.
    """
    if left.shape[1] > _INT32_SAFE_FEATURES:
        return left.double() @ right.double().t()
    if left.shape[1] == 1:  # torch's product on CPU misreads a transposed (out, 1): see _row_major
        return left.int() * right.t()
    if left.device.type != "cuda":
        return cpu_product(_row_major(left), right if has_whole_rows(right) else _row_major(right))
    left, right = _row_major(left), _row_major(right)
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
    whole = _WholeInput(inputs.data.to(torch.float32), inputs.step[:, None], inputs.zero_point[:, None])
    return _vectorwise(whole, weight, offset=True)


def _vectorwise(inputs: _WholeInput, weight: Int8Weight, *, offset: bool) -> Tensor:
    """`vectorwise_linear`; without `offset` all zero points are known to be 0."""
    product = _whole_product(inputs.values, weight.data)  # (tokens, out)
    if offset:
        whole = _exact_dtype(product.dtype, inputs.values.shape[1])
        product = product.to(whole).addcmul_(inputs.zero_point.to(whole), weight.row_sums.to(whole), value=-1)
    scaled = product.to(torch.float32)
    scaled *= weight.step  # first: the product could overflow with the largest inputs
    scaled *= inputs.step
    return scaled


def _whole_product(values: Tensor, data: Tensor | PackedWeight) -> Tensor:
    """values times data transposed, as `_WholeInput` has them: exact (tokens, out), in int32, float32 or float64."""
    if isinstance(data, PackedWeight):
        return data.product(values)
    return int8_product(_int8(values), data)


def _exact_dtype(product: torch.dtype, in_features: int) -> torch.dtype:
    """The dtype in which zero points are subtracted from products.

    In float32, both sides of the difference are at most 2^24 and so exact: the one rounding is that of the exact
    difference, as if it was computed in whole numbers and converted afterwards.
    """
    if product == torch.float32:
        return product
    return torch.int32 if in_features <= _INT32_SAFE_OFFSET_FEATURES else torch.float64


def llm_int8_linear(inputs: Tensor, weight: Int8Weight, scheme: InputScheme) -> Tensor:
    """X Wᵀ with the weight's outlier columns in 16 bit and all others in int8: float32 (tokens, out_features).

    The outlier columns of X are removed before a token's scale is computed, so that they do not enlarge it. They are
    multiplied by the exact columns of W in float32. [LLM.int8(), eq. 8, with stored columns]
    """
    columns, values = weight.outlier_cols, inputs.to(torch.float32, copy=True)
    offset = scheme == "zeropoint"
    if not columns.numel():
        return _vectorwise(_quantized_in_place(values, scheme), weight, offset=offset)
    kept = values.index_select(1, columns)  # (tokens, k)
    values.index_fill_(1, columns, 0.0)
    product = _vectorwise(_quantized_in_place(values, scheme, has_zero=True), weight, offset=offset)
    return product.addmm_(kept, weight.outlier_weight)


def input_gradient(gradient: Tensor, weight: Int8Weight) -> Tensor:
    """The gradient of X from that of X Wᵀ (tokens, out_features): float32 (tokens, in_features).

    Rounding has no gradient of use; it is taken as the identity. What is left is gradient @ W, W being the weight that
    is stored: data * step, and exact in the outlier columns. Works on blocks of columns of W.
    """
    gradient = gradient.to(torch.float32)
    data = weight.data.unpacked() if isinstance(weight.data, PackedWeight) else weight.data
    out_features, in_features = data.shape
    result = gradient.new_empty(gradient.shape[0], in_features)
    width = max(1, _BLOCK_ELEMENTS // max(1, out_features))
    for start in range(0, in_features, width):
        part = slice(start, start + width)
        result[:, part] = gradient @ (data[:, part].float() * weight.step[:, None])
    if weight.outlier_cols.numel():
        result.index_copy_(1, weight.outlier_cols, gradient @ weight.outlier_weight.t())
    return result


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
