"""The int8 products that LLM.int8() is compared with, and LLM.int8() with outlier columns found in each input.

Owns quantization by tensor and by row, with and without a zero point [LLM.int8(), eq. 1 to 5 and table 1], and
LLM.int8() as bitsandbytes computes it. Integer products are exact on every path. `matmul.llm_int8_linear` is LLM.int8()
with outlier columns that are chosen in advance.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from int8cli.llm_int8.matmul import InputScheme, int8_product, zero_point_step
from int8cli.llm_int8.quantize import INT8_MAX, quantize_rowwise

Span = Literal["tensor", "row"]

_LOWEST = -128.0
# The largest in_features for which a sum of products of two numbers of up to 255 always fits into int32.
_INT32_SAFE_FEATURES = (2**31 - 1) // (255 * 255)
_CHUNK_ELEMENTS = 1 << 22
# bitsandbytes' own constants for 1 / 127² and 1 / 127 (backends/default/ops.py).
_BITSANDBYTES_PRODUCT_STEP = 6.200124e-05
_BITSANDBYTES_WEIGHT_STEP = 7.874015718698502e-3


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """A matrix in int8: values ≈ (data - zero_point) * step, with one step for each row or one for all.

    data: int8 (rows, features); step: float32 (rows,) or (1,); zero_point: int32 of the same shape, or None for 0.
    """

    data: Tensor
    step: Tensor
    zero_point: Tensor | None = None


def quantize_matrix(values: Tensor, scheme: InputScheme, span: Span) -> Int8Matrix:
    """Quantize inputs or a weight (rows, features) with one scale for each row, or one for the whole tensor.

    `absmax` maps [-max|x|, max|x|] to [-127, 127] [eq. 1]; `zeropoint` maps [min(x, 0), max(x, 0)] to [-128, 127] with
    an offset [eq. 2 to 5]. Works on blocks of rows. A row or tensor of zeros stays zero.
    """
    if values.numel() <= _CHUNK_ELEMENTS:
        values = values.float()  # once for both passes; torch also reduces float32 faster than 16 bit
    low, high = values.amin(dim=1).float(), values.amax(dim=1).float()  # (rows,)
    if span == "tensor":
        low, high = low.amin().view(1), high.amax().view(1)
    if scheme == "absmax":
        step, offset = torch.maximum(high, -low) / INT8_MAX, None
    else:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        step = zero_point_step(low, high)
        offset = torch.round(_LOWEST - low / step).masked_fill_(step == 0, 0.0)
    divisor = step.masked_fill(step == 0, 1.0)[:, None]
    data = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    rows = max(1, _CHUNK_ELEMENTS // max(1, values.shape[1]))
    for start in range(0, values.shape[0], rows):
        part = slice(start, start + rows) if span == "row" else slice(None)
        scaled = values[start : start + rows].float() / divisor[part]
        if offset is not None:
            scaled += offset[part, None]
        data[start : start + rows] = scaled.round_().clamp_(_LOWEST, INT8_MAX)
    return Int8Matrix(data, step, None if offset is None else offset.int())


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rowwise` in blocks of rows: int8 data (out, in), float32 row_absmax (out,)."""
    rows = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    blocks = [quantize_rowwise(weight[start : start + rows]) for start in range(0, weight.shape[0], rows)]
    return torch.cat([data for data, _ in blocks]), torch.cat([absmax for _, absmax in blocks])


def restored_weight(data: Tensor, row_absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that int8 data represents, data * row_absmax / 127, in a float dtype: (out, in)."""
    restored = torch.empty(data.shape, dtype=dtype, device=data.device)
    rows = max(1, _CHUNK_ELEMENTS // max(1, data.shape[1]))
    for start in range(0, data.shape[0], rows):
        step = row_absmax[start : start + rows, None] / INT8_MAX
        restored[start : start + rows] = data[start : start + rows].float().mul_(step)
    return restored


def matrix_product(inputs: Int8Matrix, weight: Int8Matrix) -> Tensor:
    """X Wᵀ from X (tokens, in) and W (out, in) in int8: float32 (tokens, out).

    The sum of (q_x - z_x)(q_w - z_w) is computed exactly in integers, rounded once, and multiplied by the two steps.
    """
    product = int8_product(inputs.data, weight.data)  # (tokens, out), int32
    if inputs.zero_point is not None or weight.zero_point is not None:
        product = _shifted(product, inputs, weight)
    result = product.to(torch.float32)
    return result.mul_(weight.step[None]).mul_(inputs.step[:, None])  # in the order of `vectorwise_linear`


def _shifted(product: Tensor, inputs: Int8Matrix, weight: Int8Matrix) -> Tensor:
    """Σ (q_x - z_x)(q_w - z_w) from Σ q_x q_w; in place if the result fits into int32."""
    features = weight.data.shape[1]
    if features > _INT32_SAFE_FEATURES:
        product = product.long()
    sums = weight.data.sum(dim=1, dtype=product.dtype)  # (out,)
    if weight.zero_point is not None:
        product -= inputs.data.sum(dim=1, dtype=product.dtype)[:, None] * weight.zero_point[None]
        sums = sums - features * weight.zero_point
    if inputs.zero_point is not None:
        product -= inputs.zero_point[:, None] * sums[None]
    return product


def bitsandbytes_linear(
    inputs: Tensor, data: Tensor, row_absmax: Tensor, threshold: float, bias: Tensor | None = None
) -> Tensor:
    """X Wᵀ + b as bitsandbytes' `Linear8bitLt` computes it (0.50, CPU), in the inputs' dtype (tokens, out_features).

    Inputs are cast to float16. Values of |x| >= threshold do not count for a token's scale. Columns with such values
    are set to zero in int8 and multiplied, in the inputs' dtype, by columns of W rebuilt from int8. With a threshold of
    0 there is no decomposition. Unlike in bitsandbytes, a token of zeros gives zeros, not NaN cast to int8.
    """
    quantized, absmax, columns = _without_outliers(inputs.half().float(), threshold if threshold > 0.0 else math.inf)
    product = int8_product(quantized, data).to(torch.float32)  # (tokens, out)
    product *= absmax[:, None] * row_absmax[None]
    product *= _BITSANDBYTES_PRODUCT_STEP
    if bias is not None:
        product += bias
    output = product.to(inputs.dtype)
    if not columns.numel():
        return output
    rebuilt = (data[:, columns] * row_absmax[:, None] * _BITSANDBYTES_WEIGHT_STEP).to(inputs.dtype)  # (out, k)
    return output.addmm(inputs[:, columns].contiguous(), rebuilt.t())


def exact_columns_linear(inputs: Tensor, data: Tensor, row_absmax: Tensor, weight: Tensor, threshold: float) -> Tensor:
    """X Wᵀ with the outlier columns of X found as in bitsandbytes, and W's columns exact: float32 (tokens, out).

    `weight` (out, in) is the weight that data and row_absmax were made from.
    """
    quantized, absmax, columns = _without_outliers(inputs.float(), threshold)
    product = int8_product(quantized, data).to(torch.float32)  # (tokens, out)
    product *= (row_absmax / INT8_MAX)[None]
    product *= (absmax / INT8_MAX)[:, None]
    if columns.numel():
        product += inputs[:, columns].float() @ weight[:, columns].float().t()
    return product


def outlier_columns(inputs: Tensor, threshold: float) -> Tensor:
    """The columns of inputs (tokens, in) that have any |x| >= threshold: int64 (k,), sorted."""
    return (inputs.abs() >= threshold).any(dim=0).nonzero().squeeze(1)


def _without_outliers(values: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize tokens with scales that ignore outlier values, and set the outlier columns to zero.

    `values` are float32 (tokens, in). Returns int8 data of that shape, the absmax of each token's scale (tokens,), and
    the outlier columns (k,).
    """
    magnitude = values.abs()
    columns = (magnitude.amax(dim=0) >= threshold).nonzero().squeeze(1)
    if columns.numel():
        outlying = magnitude[:, columns]  # no other column has a value over the threshold
        magnitude[:, columns] = outlying.masked_fill_(outlying >= threshold, 0.0)
    absmax = magnitude.amax(dim=1)
    scale = INT8_MAX / absmax
    scale.masked_fill_(scale.isinf(), 0.0)  # a token of zeros, or of values so small that they are treated as zeros
    quantized = values * scale[:, None]
    quantized[:, columns] = 0.0
    return quantized.round_().to(torch.int8), absmax, columns
