"""The error of a weight in int8: sums over its blocks, and the figures computed from them.

Owns the definitions of the error figures. Knows no file or layer name.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Sums over part of a weight W and its int8 form Ŵ = data * row_absmax / 127; parts add up with `+`.

    All sums are float64. `max_abs_error` is max |W - Ŵ|; `sum_abs_data` is the sum of |int8 values|.
    `row_absmax_min` and `row_absmax_max` are over the stored scales; a weight without rows has inf and 0.
    """

    numel: int = 0
    sum_squared_error: float = 0.0
    sum_squared_weight: float = 0.0
    max_abs_error: float = 0.0
    sum_abs_data: float = 0.0
    row_absmax_min: float = math.inf
    row_absmax_max: float = 0.0

    def __add__(self, other: "ErrorSums") -> "ErrorSums":
        return ErrorSums(
            self.numel + other.numel,
            self.sum_squared_error + other.sum_squared_error,
            self.sum_squared_weight + other.sum_squared_weight,
            max(self.max_abs_error, other.max_abs_error),
            self.sum_abs_data + other.sum_abs_data,
            min(self.row_absmax_min, other.row_absmax_min),
            max(self.row_absmax_max, other.row_absmax_max),
        )

    @property
    def relative_frobenius_error(self) -> float:
        """‖W - Ŵ‖ / ‖W‖; 0 for a weight of zeros, which int8 represents exactly."""
        if self.sum_squared_weight == 0.0:
            return 0.0
        return math.sqrt(self.sum_squared_error / self.sum_squared_weight)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise, 10 log10(‖W‖² / ‖W - Ŵ‖²), in dB; None if there is no error."""
        if self.sum_squared_error == 0.0:
            return None
        return 10.0 * math.log10(self.sum_squared_weight / self.sum_squared_error)

    @property
    def mean_range_use(self) -> float:
        """Mean |int8 value| / 127: how much of the int8 range the weight uses, from 0 to 1."""
        return self.sum_abs_data / (127.0 * self.numel) if self.numel else 0.0
