"""Vector-wise int8 quantization of linear weights, in blocks, with the error figures of the same pass.

Owns the rounding: the result is bit for bit what bitsandbytes' CPU path gives for float16 and bfloat16 weights. Where
that path is undefined (rows whose absmax is 0, not finite, or outside float16) the behaviour is stated here.

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
# so the cast changes nothing but values that are subnormal in float16; in rows with an absmax above this bound those
# round to the same int8 value either way.
_HALF_MATTERS_BELOW = 0.0155
_HALF_MAX = 65504.0
# Below this the float32 scale 127 / row_absmax overflows or comes close: such rows are computed in float64.
_TINY_ABSMAX = 1e-36

_BITS_DTYPE = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
_MAGNITUDE_MASK = {torch.int16: 0x7FFF, torch.int32: 0x7FFFFFFF}

# MKL's vector functions (sqrt, exp, log and all others) ask for the kind of processor at the first call of any of them.
# On Intel's the answer is stored raw and corrected in a second step: a thread that calls one in between is given a
# variant with relative errors of 1e-4, and keeps that result. A module is imported once, by one thread, before anything
# in it can be called, so that this is the first call.
torch.ones(1).sqrt_()


class NonFiniteWeightError(ValueError):
    """A block holds NaN or an infinity, first at (`row`, `column`) of the block."""

    def __init__(self, row: int, column: int, value: float) -> None:
        super().__init__(f"{value} at row {row}, column {column}")
        self.row, self.column, self.value = row, column, value


class BlockQuantizer:
    """Quantizes blocks of at most `capacity` elements in buffers allocated once. One thread at a time.

    `float32_via_half` treats float32 weights as bitsandbytes does (a cast to float16 first: other scales, and one value
    in 170 off by one); without it float32 is quantized as it is. float16 and bfloat16 are not affected.
    """

    def __init__(self, capacity: int, *, device: str = "cpu", float32_via_half: bool = False) -> None:
        self.capacity = capacity
        self.float32_via_half = float32_via_half
        self.device = torch.device(device)
        self._buffers = torch.empty((2, capacity), device=self.device)
        self._scratch = _Scratch(self._buffers, (0, 0))

    def row_absmax(self, block: Tensor) -> Tensor:
        """Largest magnitude of each row of a (rows, columns) block: float32 (rows,), exact.

        Raises NonFiniteWeightError at the first NaN or infinity. Magnitudes are compared as integers: the bits of
        floats of one sign are ordered like the floats, NaN above infinity, and integer amax is the vectorised one.
        """
        bits_dtype = _BITS_DTYPE[block.dtype]
        magnitude = self._scratch_of(block).magnitude[bits_dtype]
        torch.bitwise_and(block.view(bits_dtype), _MAGNITUDE_MASK[bits_dtype], out=magnitude)
        absmax = magnitude.amax(dim=1).view(block.dtype).float()
        if not math.isfinite(absmax.max().item()):  # NaN is passed on by max
            _raise_first_non_finite(block, absmax)
        return absmax

    def quantize(self, block: Tensor, row_absmax: Tensor, *, data: Tensor, stored_absmax: Tensor) -> None:
        """Quantize a block into `data`, given the absmax of its whole rows (it may be only some of their columns).

        block: (rows, columns), contiguous, on this quantizer's device; row_absmax: float32 (rows,) from `row_absmax`.
        data: int8 (rows, columns) and stored_absmax: float32 (rows,) are filled; both may be on another device.
        The stored absmax differs from the one given in rows that go through float16. A row of zeros stays zero with the
        scale 0, as does a bfloat16 row so small that float16 has only zeros for it.
        """
        scaled = self._scratch_of(block).scaled
        absmax = self._quantize(block, row_absmax, scaled, scaled).absmax
        self._hand_over(scaled, absmax, data, stored_absmax)

    def quantize_and_measure(
        self, block: Tensor, row_absmax: Tensor, *, data: Tensor, stored_absmax: Tensor
    ) -> ErrorSums:
        """The same, and what it did to the block. Takes about twice as long."""
        scratch = self._scratch_of(block)
        rows = self._quantize(block, row_absmax, scratch.scaled, scratch.rounded)
        self._hand_over(scratch.rounded, rows.absmax, data, stored_absmax)
        if rows.plain:
            return scratch.error_sums(rows.absmax, rows.extremes)
        return scratch.error_sums(rows.absmax, _extremes(rows.absmax)) + _lost_rows(block, row_absmax, rows.absmax)

    def _quantize(self, block: Tensor, row_absmax: Tensor, scaled: Tensor, rounded: Tensor) -> "_Rows":
        """W in units of each row's step, and that rounded; `rounded` may be `scaled` where only it is wanted."""
        extremes = _extremes(row_absmax)
        plain = self._is_plain(block.dtype, extremes[0])
        absmax = row_absmax if plain else self._absmax_to_store(block.dtype, row_absmax)
        scaled.copy_(block)
        scaled.mul_(_scale(absmax, plain=plain)[:, None])
        torch.round(scaled, out=rounded)
        if not plain:
            self._mend_rows(block, row_absmax, absmax, scaled, rounded)
        return _Rows(absmax, plain, extremes)

    def _hand_over(self, rounded: Tensor, absmax: Tensor, data: Tensor, stored_absmax: Tensor) -> None:
        """Give the caller what was made. It may be read at once, also where it had to come from another device."""
        data.copy_(rounded, non_blocking=True)
        stored_absmax.copy_(absmax, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _scratch_of(self, block: Tensor) -> "_Scratch":
        """The buffers in a block's shape, which is mostly that of the block before."""
        if self._scratch.shape != block.shape:
            self._scratch = _Scratch(self._buffers, block.shape)
        return self._scratch

    def _is_plain(self, dtype: torch.dtype, smallest: float) -> bool:
        """Whether no row of a block needs more than the scale: the usual case, told by the smallest row."""
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

    def _mend_rows(self, block: Tensor, row_absmax: Tensor, absmax: Tensor, scaled: Tensor, rounded: Tensor) -> None:
        """Compute the rows again that go through float16, and those too small for a float32 scale."""
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
    """Quantize a linear weight (out, in) to int8 with one absmax per output row.

    Returns int8 data (out, in) and float32 row absmax (out,); the weight is `data * row_absmax / 127`. An all-zero row
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

    A row of zeros gets float32's epsilon: its weight is zero under any step, and no one divides by zero.
    """
    zero = row_absmax == 0
    row_absmax.div_(INT8_MAX).masked_fill_(zero, torch.finfo(torch.float32).eps)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a block: the absmax to store, whether none needed more than the scale, the extremes of the given."""

    absmax: Tensor
    plain: bool
    extremes: tuple[float, float]


def _scale(absmax: Tensor, *, plain: bool = False) -> Tensor:
    """127 / absmax with bitsandbytes' two roundings; 0 for rows of zeros (and for tiny rows, computed elsewhere)."""
    scale = absmax.reciprocal().mul_(INT8_MAX)
    return scale if plain else scale.masked_fill_(absmax < _TINY_ABSMAX, 0.0)


def _extremes(absmax: Tensor) -> tuple[float, float]:
    low, high = absmax.aminmax()
    return low.item(), high.item()


class _Scratch:
    """The buffers of a quantizer in the shape of one block, and what they hold at the end: the error of the block.

    Views are made once for many blocks: with them, a call of torch takes as long as the arithmetic of a few thousand
    elements, and holds Python's lock, which threads over blocks share.
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

        Reductions run along rows in float32, where their length is bounded by a block, and across rows in float64. The
        largest error is taken from the squares: a float32's square has a square root that rounds to that float32.
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


def _lost_rows(block: Tensor, row_absmax: Tensor, absmax: Tensor) -> ErrorSums:
    """What rows add to the error that are not zero but stored as zeros: themselves."""
    lost = block[(absmax == 0) & (row_absmax > 0)].double()
    if not lost.numel():
        return ErrorSums()
    energy = float(lost.square().sum())
    return ErrorSums(sum_squared_error=energy, sum_squared_weight=energy, max_abs_error=float(lost.abs().max()))


def _raise_first_non_finite(block: Tensor, absmax: Tensor) -> None:
    row = int((~torch.isfinite(absmax)).nonzero()[0])
    column = int((~torch.isfinite(block[row])).nonzero()[0])
    raise NonFiniteWeightError(row, column, float(block[row, column]))
