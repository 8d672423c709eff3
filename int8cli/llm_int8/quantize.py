"""Vector-wise int8 quantization of linear weights, in blocks, with the error figures from the same pass.

Owns the rounding: for float16 and bfloat16 weights the result is that of bitsandbytes' CPU path, bit for bit. For rows
where that path is undefined (absmax 0, not finite, or outside float16) this module defines the result.

Algorithm [LLM.int8(), section 2.1, vector-wise]: row_absmax = max|w| over in_features, data = round_half_even(w * s)
with s = reciprocal(row_absmax) * 127 in float32. bitsandbytes writes `127.0 / row_absmax`, which torch evaluates as
that reciprocal and product: two roundings, and a true division would differ in about one value of 4,000.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from int8cli.llm_int8.metrics import ErrorSums

INT8_MAX = 127.0

# bitsandbytes casts every weight to float16 before it quantizes. A bfloat16 has fewer significant bits than a float16,
# so the cast changes only values that are subnormal in float16. In rows whose absmax is above this bound, those round
# to the same int8 value with and without the cast.
_HALF_MATTERS_BELOW = 0.0155
_HALF_MAX = 65504.0
# Below this the float32 scale 127 / row_absmax overflows or nearly does: such rows are computed in float64.
_TINY_ABSMAX = 1e-36

_BITS_DTYPE = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
_MAGNITUDE_MASK = {torch.int16: 0x7FFF, torch.int32: 0x7FFFFFFF}

# MKL's vector functions (sqrt, exp, log and all others) detect the processor at the first call of any of them. On Intel
# processors the result is stored raw and corrected in a second step. A thread that calls one in between gets a variant
# with relative errors of 1e-4, and keeps it. A module is imported once, by one thread, before anything in it can be
# called, so this is the first call.
torch.ones(1).sqrt_()


class NonFiniteWeightError(ValueError):
    """A block contains NaN or an infinity, first at (`row`, `column`) of the block."""

    def __init__(self, row: int, column: int, value: float) -> None:
        super().__init__(f"{value} at row {row}, column {column}")
        self.row, self.column, self.value = row, column, value


class BlockQuantizer:
    """Quantizes blocks of at most `capacity` elements, in buffers that are allocated once. Not thread-safe.

    `float32_via_half` casts float32 weights to float16 first, as bitsandbytes does: scales differ, and one value in 170
    is off by one. Otherwise float32 is quantized directly. float16 and bfloat16 are not affected.
    """

    def __init__(self, capacity: int, *, device: str = "cpu", float32_via_half: bool = False) -> None:
        self.capacity = capacity
        self.float32_via_half = float32_via_half
        self.device = torch.device(device)
        self._buffers = torch.empty((2, capacity), device=self.device)
        self._scratch = _Scratch(self._buffers, (0, 0))

    def row_absmax(self, block: Tensor) -> Tensor:
        """Largest magnitude of each row of a (rows, columns) block: float32 (rows,), exact.

        Raises NonFiniteWeightError at the first NaN or infinity. Magnitudes are compared as integers, for which amax is
        vectorized: the bits of floats of one sign are ordered like the floats, with NaN above infinity.
        """
        bits_dtype = _BITS_DTYPE[block.dtype]
        magnitude = self._scratch_of(block).magnitude[bits_dtype]
        torch.bitwise_and(block.view(bits_dtype), _MAGNITUDE_MASK[bits_dtype], out=magnitude)
        absmax = magnitude.amax(dim=1).view(block.dtype).float()
        if not math.isfinite(absmax.max().item()):  # max propagates NaN
            _raise_first_non_finite(block, absmax)
        return absmax

    def quantize(self, block: Tensor, row_absmax: Tensor, *, data: Tensor, stored_absmax: Tensor) -> None:
        """Quantize a block into `data`, given the absmax of its whole rows (the block may have only some columns).

        block: (rows, columns), contiguous, on this quantizer's device; row_absmax: float32 (rows,) from `row_absmax`.
        Fills data: int8 (rows, columns) and stored_absmax: float32 (rows,), which may be on another device.
        The stored absmax differs from the given one in rows that are cast to float16. A row of zeros stays zero with
        the scale 0, as does a bfloat16 row so small that it is zero in float16.
        """
        scaled = self._scratch_of(block).scaled
        absmax = self._quantize(block, row_absmax, scaled, scaled).absmax
        self._copy_out(scaled, absmax, data, stored_absmax)

    def quantize_and_measure(
        self, block: Tensor, row_absmax: Tensor, *, data: Tensor, stored_absmax: Tensor
    ) -> ErrorSums:
        """Quantize as `quantize` does, and return the error sums of the block. Takes about twice as long."""
        scratch = self._scratch_of(block)
        rows = self._quantize(block, row_absmax, scratch.scaled, scratch.rounded)
        self._copy_out(scratch.rounded, rows.absmax, data, stored_absmax)
        if rows.plain:
            return scratch.error_sums(rows.absmax, rows.extremes)
        return scratch.error_sums(rows.absmax, _extremes(rows.absmax)) + _zeroed_rows(block, row_absmax, rows.absmax)

    def _quantize(self, block: Tensor, row_absmax: Tensor, scaled: Tensor, rounded: Tensor) -> "_Rows":
        """Fill `scaled` with W in units of each row's step, and `rounded` with it rounded. Both may be one buffer."""
        extremes = _extremes(row_absmax)
        plain = self._is_plain(block.dtype, extremes[0])
        absmax = row_absmax if plain else self._absmax_to_store(block.dtype, row_absmax)
        scaled.copy_(block)
        scaled.mul_(_scale(absmax, plain=plain)[:, None])
        torch.round(scaled, out=rounded)
        if not plain:
            self._recompute_rows(block, row_absmax, absmax, scaled, rounded)
        return _Rows(absmax, plain, extremes)

    def _copy_out(self, rounded: Tensor, absmax: Tensor, data: Tensor, stored_absmax: Tensor) -> None:
        """Copy the result to the caller's tensors. They can be read when this returns, even on another device."""
        data.copy_(rounded, non_blocking=True)
        stored_absmax.copy_(absmax, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _scratch_of(self, block: Tensor) -> "_Scratch":
        """The buffers in a block's shape, which is usually that of the previous block."""
        if self._scratch.shape != block.shape:
            self._scratch = _Scratch(self._buffers, block.shape)
        return self._scratch

    def _is_plain(self, dtype: torch.dtype, smallest: float) -> bool:
        """Whether no row of a block needs special treatment. `smallest` is the smallest absmax. The usual case."""
        if dtype == torch.float32:
            return not self.float32_via_half and smallest >= _TINY_ABSMAX
        return smallest > (_HALF_MATTERS_BELOW if dtype == torch.bfloat16 else 0.0)

    def _goes_through_half(self, dtype: torch.dtype, row_absmax: Tensor) -> Tensor:
        if dtype == torch.bfloat16:
            return (row_absmax > 0) & (row_absmax <= _HALF_MATTERS_BELOW)
        if dtype == torch.float32 and self.float32_via_half:
            return row_absmax <= _HALF_MAX
        return torch.zeros_like(row_absmax, dtype=torch.bool)

    def _absmax_to_store(self, dtype: torch.dtype, row_absmax: Tensor) -> Tensor:
        return torch.where(self._goes_through_half(dtype, row_absmax), row_absmax.half().float(), row_absmax)

    def _recompute_rows(
        self, block: Tensor, row_absmax: Tensor, absmax: Tensor, scaled: Tensor, rounded: Tensor
    ) -> None:
        """Recompute the rows that are cast to float16, and those too small for a float32 scale."""
        rows = self._goes_through_half(block.dtype, row_absmax).nonzero().squeeze(1)
        if len(rows):
            halves = block.index_select(0, rows).half().float()
            rounded.index_copy_(0, rows, halves.mul_(_scale(absmax[rows])[:, None]).round_())
        rows = ((absmax > 0) & (absmax < _TINY_ABSMAX)).nonzero().squeeze(1)
        if len(rows):
            exact = block.index_select(0, rows).double() * (INT8_MAX / absmax[rows].double())[:, None]
            scaled.index_copy_(0, rows, exact.float())
            rounded.index_copy_(0, rows, exact.round_().float())


def quantize_rowwise(weight: Tensor, *, float32_via_half: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize a linear weight (out, in) to int8 with one absmax for each output row.

    Returns int8 data (out, in) and float32 row_absmax (out,); the weight is `data * row_absmax / 127`. A row of zeros
    stays zero. Raises NonFiniteWeightError. [LLM.int8(), section 2.1]
    """
    weight = weight.contiguous()
    quantizer = BlockQuantizer(weight.numel(), device=str(weight.device), float32_via_half=float32_via_half)
    data = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], device=weight.device)
    quantizer.quantize(weight, quantizer.row_absmax(weight), data=data, stored_absmax=absmax)
    return data, absmax


def quantization_steps(row_absmax: Tensor) -> None:
    """Turn float32 row_absmax (rows,) into the steps row_absmax / 127, in place; the weight is `data * step`.

    A row of zeros gets float32's epsilon: its weight is zero with any step, and a reader can divide by it.
    """
    zero = row_absmax == 0
    row_absmax.div_(INT8_MAX).masked_fill_(zero, torch.finfo(torch.float32).eps)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a block: the absmax to store, whether all are plain, and the extremes of the given absmax."""

    absmax: Tensor
    plain: bool
    extremes: tuple[float, float]


def _scale(absmax: Tensor, *, plain: bool = False) -> Tensor:
    """127 / absmax with bitsandbytes' two roundings; 0 for rows of zeros, and for tiny rows, which are recomputed."""
    scale = absmax.reciprocal().mul_(INT8_MAX)
    return scale if plain else scale.masked_fill_(absmax < _TINY_ABSMAX, 0.0)


def _extremes(absmax: Tensor) -> tuple[float, float]:
    low, high = absmax.aminmax()
    return low.item(), high.item()


class _Scratch:
    """The buffers of a quantizer in the shape of one block, and the error sums computed from them.

    Views are made once for many blocks. Making one takes as long as the arithmetic of a few thousand elements, and
    blocks the interpreter, which the threads share.
    """

    def __init__(self, buffers: Tensor, shape: tuple[int, ...]) -> None:
        rows, columns = self.shape = torch.Size(shape)
        self.scaled, self.rounded = (buffer[: rows * columns].view(shape) for buffer in buffers)  # float32
        self.magnitude = {
            dtype: buffers[0].view(dtype)[: rows * columns].view(shape) for dtype in (torch.int16, torch.int32)
        }
        figures = torch.empty((4, rows), device=buffers.device)
        self._weight, self._squared_error, self._max_error, self._abs_data = figures
        self._figures, self._exact = figures, torch.empty_like(figures, dtype=torch.float64)
        self._exact_squares, self._exact_max = self._exact[:2], self._exact[2]

    def error_sums(self, absmax: Tensor, extremes: tuple[float, float]) -> ErrorSums:
        """Error sums of a block from W and Ŵ in units of each row's quantization step. Overwrites both buffers.

        Reductions along rows are in float32, since a block bounds their length; those across rows are in float64. The
        largest error is computed from the squares: the square root of a float32's square rounds to that float32.
        """
        torch.linalg.vector_norm(self.scaled, dim=1, out=self._weight)
        squares = self.scaled.sub_(self.rounded).square_()
        torch.sum(squares, dim=1, out=self._squared_error)
        torch.amax(squares, dim=1, out=self._max_error)
        torch.sum(self.rounded.abs_(), dim=1, out=self._abs_data)
        self._weight.square_()
        self._max_error.sqrt_()
        step = absmax.double().div_(INT8_MAX)
        self._exact.copy_(self._figures)
        self._exact_squares.mul_(step * step)
        max_abs_error = self._exact_max.mul_(step).max().item()
        squared_weight, squared_error, _, abs_data = self._exact.sum(dim=1).tolist()
        return ErrorSums(
            numel=self.scaled.numel(),
            sum_squared_error=squared_error,
            sum_squared_weight=squared_weight,
            max_abs_error=max_abs_error,
            sum_abs_data=abs_data,
            row_absmax_min=extremes[0],
            row_absmax_max=extremes[1],
        )


def _zeroed_rows(block: Tensor, row_absmax: Tensor, absmax: Tensor) -> ErrorSums:
    """The error of rows that are not zero but are stored as zeros: the rows themselves."""
    lost = block[(absmax == 0) & (row_absmax > 0)].double()
    if not lost.numel():
        return ErrorSums()
    energy = float(lost.square().sum())
    return ErrorSums(sum_squared_error=energy, sum_squared_weight=energy, max_abs_error=float(lost.abs().max()))


def _raise_first_non_finite(block: Tensor, absmax: Tensor) -> None:
    row = int((~torch.isfinite(absmax)).nonzero()[0])
    column = int((~torch.isfinite(block[row])).nonzero()[0])
    raise NonFiniteWeightError(row, column, float(block[row, column]))
