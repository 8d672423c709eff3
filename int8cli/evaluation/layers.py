"""A linear layer under evaluation: its weight in the forms that methods multiply with, and its output in 16 bit.

Owns how long a form stays in memory: each is made once for all sequences of a unit. Does not know about models or
files.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from int8cli.llm_int8.baselines import (
    Int8Matrix,
    Span,
    quantize_matrix,
    quantize_weight,
    restored_weight,
)
from int8cli.llm_int8.limits import Steps
from int8cli.llm_int8.matmul import InputScheme, Int8Weight
from int8cli.llm_int8.quantize import INT8_MAX
from int8cli.llm_int8.scales import scaled
from int8cli.runtime.converted_tensors import ExactColumns, Int8Data

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class SmoothedLayer:
    """The exponents of a layer's input columns, int8 (in,), and the columns to store then, int64 (k,), sorted.

    `steps` of an exponent are a factor of 2. `divisors`, float32 (in,), are what inputs are divided by.
    """

    exponents: Tensor
    columns: Tensor
    steps: Steps
    divisors: Tensor


class Layer:
    """One linear layer's weight (out, in) for all methods.

    `weight` is the 16-bit weight, None if only int8 is available. `stored` is the int8 data of a converted model;
    without it, the weight is quantized as in `convert`. `exact_columns` are the stored outlier columns, if any.
    `smoothing` is what the smoothed methods compute with; without it, they compute with the layer as it is.
    `columns_of_stored` are the exponents of the columns of `stored`, with their steps, if inputs are given undivided:
    the layer is then the smoothed one, and `given` divides its inputs.
    """

    def __init__(
        self,
        name: str,
        weight: Tensor | None,
        *,
        stored: Int8Data | None = None,
        exact_columns: ExactColumns | None = None,
        threshold: float,
        smoothing: SmoothedLayer | None = None,
        columns_of_stored: tuple[Tensor, Steps] | None = None,
    ) -> None:
        self.name, self.threshold, self.exact_columns = name, threshold, exact_columns
        self._smoothing = smoothing
        self._smoothed: Layer | None = None
        self._columns_of_stored = columns_of_stored
        if weight is not None and columns_of_stored is not None:
            weight = scaled(weight, columns_of_stored[1], columns=columns_of_stored[0])
        self._weight, self._stored = weight, stored
        self._matrix: tuple[InputScheme, Span, Int8Matrix] | None = None
        self._restored: Tensor | None = None
        self._with_columns: Int8Weight | None = None

    @property
    def weight(self) -> Tensor:
        assert self._weight is not None, "this method needs the 16-bit weight"
        return self._weight

    @property
    def rows(self) -> Int8Data:
        """int8 with one absmax per row: the form of a weight in LLM.int8()."""
        if self._stored is None:
            self._stored = Int8Data(*quantize_weight(self.weight))
        return self._stored

    def matrix(self, scheme: InputScheme, span: Span) -> Int8Matrix:
        """int8 for the methods that multiply two int8 matrices. Only the last such form stays in memory."""
        if scheme == "absmax" and span == "row":
            return Int8Matrix(self.rows.data, self.rows.row_absmax / INT8_MAX)
        if self._matrix is None or self._matrix[:2] != (scheme, span):
            self._matrix = (scheme, span, quantize_matrix(self.weight, scheme, span))
        return self._matrix[2]

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The float weight that the int8 data represents."""
        if self._restored is None:
            self._restored = restored_weight(self.rows.data, self.rows.row_absmax, dtype)
        return self._restored

    def with_columns(self, columns: Tensor | None = None) -> Int8Weight:
        """int8 with these columns in 16 bit, by default the stored columns."""
        if columns is not None:
            return Int8Weight.of(self.rows.data, self.rows.row_absmax, columns, self.weight[:, columns])
        if self._with_columns is None:
            found = self.exact_columns
            columns_and_weight = (found.columns, found.weight) if found is not None else (None, None)
            self._with_columns = Int8Weight.of(self.rows.data, self.rows.row_absmax, *columns_and_weight)
        return self._with_columns

    def given(self, inputs: Tensor) -> Tensor:
        """The inputs (tokens, in) of this layer, from those in the 16-bit model."""
        if self._columns_of_stored is None:
            return inputs
        columns, steps = self._columns_of_stored
        return scaled(inputs, steps, columns=columns, undo=True)

    @property
    def smoothed(self) -> "Layer":
        """The layer with its columns multiplied by their scales, and other columns stored; itself without any."""
        if self._smoothing is None:
            return self
        if self._smoothed is None:
            weight = scaled(self.weight, self._smoothing.steps, columns=self._smoothing.exponents)
            columns = self._smoothing.columns
            exact = ExactColumns(columns, weight[:, columns])
            self._smoothed = Layer(self.name, weight, exact_columns=exact, threshold=self.threshold)
        return self._smoothed

    def divided(self, inputs: Tensor) -> Tensor:
        """The inputs (tokens, in) of the smoothed layer."""
        if self._smoothing is None:
            return inputs
        return (inputs.float() / self._smoothing.divisors).to(inputs.dtype)

    def forget(self) -> None:
        """Free the forms that only one method uses. The smoothed layer stays for the next smoothed method."""
        self._matrix = self._restored = self._with_columns = None
        if self._smoothed is not None:
            self._smoothed.forget()


class ErrorMeter:
    """The output error of one layer by method, on its inputs in the 16-bit model.

    Inputs are recorded while the 16-bit model runs. Each method is then measured on all of them.
    """

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._energy = 0.0

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The recorded inputs, one (tokens, in) for each call of the layer."""
        return tuple(self._inputs)

    def record(self, inputs: Tensor, weight: Tensor) -> None:
        """Record an input (tokens, in), and its product with the weight in float32."""
        output = float_product(inputs, weight)
        self._inputs.append(inputs)
        self._outputs.append(output)
        self._energy += _energy(output)

    @property
    def energy(self) -> float:
        """‖Y‖²."""
        return self._energy

    def squared_error(self, outputs: Iterable[Tensor]) -> float:
        """‖Y_method - Y‖², given a method's outputs for the inputs."""
        return sum(_energy(found.float() - exact) for found, exact in zip(outputs, self._outputs, strict=True))


def float_product(inputs: Tensor, weight: Tensor) -> Tensor:
    """X Wᵀ in float32 from 16-bit factors: (tokens, out). Computed in blocks of rows of W."""
    values = inputs.float()
    rows = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    blocks = [values @ weight[start : start + rows].float().t() for start in range(0, weight.shape[0], rows)]
    return torch.cat(blocks, dim=1)


def _energy(values: Tensor) -> float:
    """The sum of squares: in float32 along rows, in float64 over them."""
    return float(torch.linalg.vector_norm(values, dim=1).double().square().sum())
