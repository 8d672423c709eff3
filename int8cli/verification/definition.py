"""What the method makes of rows of a weight, written down a second time, as plainly as it can be.

Owns a computation that shares nothing with the conversion, which works in blocks, in place, and by shorter ways where
these lead to the same bits. A fault in one of the two shows where they differ.

Definition [bitsandbytes 0.50, `int8_vectorwise_quant` on the CPU]: the weight as float16 (float32 weights as they are,
unless they go through float16); row_absmax = max|w| of a row; data = round_half_even(w * (1 / row_absmax * 127)), both
products in float32. Where that is not defined: rows that float16 cannot hold are quantized as they are; rows of zeros,
or zero in float16, have the scale 0; rows whose 127 / row_absmax exceeds float32 are computed in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 127
_SCALE_FITS_ABOVE = 1e-36
_LARGEST_HALF = 65504.0


@dataclass(frozen=True, slots=True)
class WeightRows:
    """Rows of an int8 weight: data int8 (rows, in), row_absmax float32 (rows,)."""

    data: Tensor
    row_absmax: Tensor

    @property
    def step(self) -> Tensor:
        """float32 (rows,): what one unit of the data stands for. A row of zeros has float32's epsilon."""
        epsilon = torch.finfo(torch.float32).eps
        return (self.row_absmax / _STEPS).where(self.row_absmax != 0, epsilon)


def int8_rows(weight: Tensor, *, float32_via_half: bool) -> WeightRows:
    """Whole rows (rows, in) of finite float16, bfloat16 or float32, quantized by the definition."""
    floats, row_absmax = _as_quantized(weight, float32_via_half=float32_via_half)
    scale = (1 / row_absmax) * _STEPS
    data = (floats * scale[:, None]).round_()
    small = row_absmax < _SCALE_FITS_ABOVE
    if bool(small.any()):
        data[small] = (floats[small].double() * (_STEPS / row_absmax[small].double())[:, None]).round().float()
        data[row_absmax == 0] = 0
    return WeightRows(data.to(torch.int8), row_absmax)


def _as_quantized(weight: Tensor, *, float32_via_half: bool) -> tuple[Tensor, Tensor]:
    """The values that are quantized, and the absmax of their rows, both float32."""
    if weight.dtype != torch.float32 or float32_via_half:
        halves = weight.half().float()
        too_large = _absmax(weight.float()) > _LARGEST_HALF
        if not bool(too_large.any()):
            return halves, _absmax(halves)
        halves[too_large] = weight[too_large].float()
        return halves, _absmax(halves)
    return weight, _absmax(weight)


def _absmax(floats: Tensor) -> Tensor:
    return floats.abs().amax(dim=1) if floats.shape[1] else floats.new_zeros(len(floats))


def scales(exponents: Tensor, steps: int) -> Tensor:
    """2 ** (exponent / steps) for each of the int8 exponents: float64. With `steps` over 1, a mantissa of 13 bits."""
    found = []
    for exponent in exponents.tolist():
        whole, part = divmod(exponent, steps)
        found.append(2.0**whole * round(2.0 ** (12 + part / steps)) / 2.0**12)
    return torch.tensor(found, dtype=torch.float64)


def scaled(values: Tensor, *, columns: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """Floats times the scales of their columns, divided by those of their rows, and rounded to their own dtype."""
    wide = values.double()
    if columns is not None:
        wide *= columns
    if rows is not None:
        wide /= rows
    return wide.to(values.dtype)
