"""What an exponent of a smoothing stands for: powers of two, or steps of about 2^(1/4) between them.

An exponent k of a column stands for the scale s(k): x_j / s(k) and w_j s(k). With whole steps s(k) = 2^k, and no digit
is lost. With quarter steps s(k) = 2^floor(k / 4) times one of four constants of 13 bits. A product or quotient of a
scale and a float16 or bfloat16 then has so few bits that float32 and the final rounding give the value nearest to the
exact one, as float64 does for a float32.
"""

import torch
from torch import Tensor

from int8cli.llm_int8.limits import EXACT_STEPS, FINE_STEPS, Steps

_BITS = 12
# 2^0, 2^(1/4), 2^(1/2) and 2^(3/4), each to 13 bits.
QUARTERS = tuple(round(2.0 ** (_BITS + k / FINE_STEPS)) / 2.0**_BITS for k in range(FINE_STEPS))


def powers_of_two(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """2^k for each exponent, exact, in a float dtype that can hold it. |k| <= 126."""
    bits = (exponents.to(torch.int32) + 127) << 23
    return bits.view(torch.float32).to(dtype)


def scales(exponents: Tensor, steps: Steps) -> Tensor:
    """s(k) for each exponent, exact: float32."""
    if steps == EXACT_STEPS:
        return powers_of_two(exponents, torch.float32)
    number = exponents.to(torch.int64)
    whole = torch.div(number, steps, rounding_mode="floor")
    quarters = torch.tensor(QUARTERS, dtype=torch.float32, device=exponents.device)
    return powers_of_two(whole, torch.float32) * quarters[number - whole * steps]


def scaled(
    values: Tensor,
    steps: Steps,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    undo: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Floats (rows, columns) with column j multiplied by s(columns_j), and row i divided by s(-rows_i): a new tensor.

    So the exponents of rows have the opposite sign of those of the columns that the rows make. With `undo` it is the
    other way round. Each value is rounded once, to the nearest of its dtype: not at all with whole steps, unless it is
    too small or too large. `out` gets the result.
    """
    exact = steps == EXACT_STEPS
    wide = values.dtype if exact else torch.float64 if values.dtype == torch.float32 else torch.float32
    result = out if exact and out is not None else torch.empty(values.shape, dtype=wide, device=values.device)
    result.copy_(values)
    if columns is not None:
        _scale(result, scales(columns, steps).to(wide), divide=undo)
    if rows is not None:
        _scale(result, scales(-rows, steps).to(wide)[:, None], divide=not undo)
    if exact:
        return result
    return result.to(values.dtype) if out is None else out.copy_(result)


def _scale(values: Tensor, factors: Tensor, *, divide: bool) -> None:
    if divide:
        values.div_(factors)
    else:
        values.mul_(factors)
