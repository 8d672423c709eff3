"""A linear layer under evaluation: its weight in the forms that methods multiply with, and what it gets in 16 bit.

Owns how long a form is kept: each is made once for all sequences of a unit. Knows no model and no file.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from int8cli.llm_int8.baselines import (
    Int8Matrix,
    Span,
    quantize_matrix,
    quantize_weight,
    restored_weight,
)
from int8cli.llm_int8.matmul import InputScheme, Int8Weight
from int8cli.llm_int8.quantize import INT8_MAX
from int8cli.runtime.converted import ExactColumns, Int8Data

_CHUNK_ELEMENTS = 1 << 22


class Layer:
    """One linear layer's weight (out, in) for all methods.

    `weight` is in 16 bit, None where there is int8 alone. `stored` is what a converted model holds for it; without it
    the weight is quantized as convert does. `exact_columns` are the stored outlier columns, if any.
    """

    def __init__(
        self,
        name: str,
        weight: Tensor | None,
        *,
        stored: Int8Data | None = None,
        exact_columns: ExactColumns | None = None,
        threshold: float,
    ) -> None:
        self.name, self.threshold, self.exact_columns = name, threshold, exact_columns
        self._weight, self._stored = weight, stored
        self._matrix: tuple[InputScheme, Span, Int8Matrix] | None = None
        self._restored: Tensor | None = None
        self._with_columns: Int8Weight | None = None

    @property
    def weight(self) -> Tensor:
        assert self._weight is not None, "a method that needs the 16-bit weight was let through without it"
        return self._weight

    @property
    def rows(self) -> Int8Data:
        """int8 with one absmax a row: LLM.int8()'s own form of a weight."""
        if self._stored is None:
            self._stored = Int8Data(*quantize_weight(self.weight))
        return self._stored

    def matrix(self, scheme: InputScheme, span: Span) -> Int8Matrix:
        """int8 for the methods of one product; of several such forms only the last stays in memory."""
        if scheme == "absmax" and span == "row":
            return Int8Matrix(self.rows.data, self.rows.row_absmax / INT8_MAX)
        if self._matrix is None or self._matrix[:2] != (scheme, span):
            self._matrix = (scheme, span, quantize_matrix(self.weight, scheme, span))
        return self._matrix[2]

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The float weight that the int8 data stands for."""
        if self._restored is None:
            self._restored = restored_weight(self.rows.data, self.rows.row_absmax, dtype)
        return self._restored

    def with_columns(self, columns: Tensor | None = None) -> Int8Weight:
        """int8 beside these columns in 16 bit; beside the stored ones if none are given."""
        if columns is not None:
            return Int8Weight.of(self.rows.data, self.rows.row_absmax, columns, self.weight[:, columns])
        if self._with_columns is None:
            found = self.exact_columns
            columns_and_weight = (found.columns, found.weight) if found is not None else (None, None)
            self._with_columns = Int8Weight.of(self.rows.data, self.rows.row_absmax, *columns_and_weight)
        return self._with_columns

    def forget(self) -> None:
        """Let go of the forms that only one method uses."""
        self._matrix = self._restored = self._with_columns = None


class ErrorMeter:
    """The output error of one layer by method, on inputs that the 16-bit model gave it.

    Inputs are taken down while the 16-bit model runs; each method is then measured on all of them.
    """

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._energy = 0.0

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What was taken down, one (tokens, in) for each call of the layer."""
        return tuple(self._inputs)

    def take(self, inputs: Tensor, weight: Tensor) -> None:
        """Note an input (tokens, in) and what it gives with the weight, in float32."""
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
    """X Wᵀ in float32 from 16-bit factors, on blocks of W's rows: (tokens, out)."""
    values = inputs.float()
    rows = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    blocks = [values @ weight[start : start + rows].float().t() for start in range(0, weight.shape[0], rows)]
    return torch.cat(blocks, dim=1)


def _energy(values: Tensor) -> float:
    """The sum of squares: in float32 along rows, in float64 over them."""
    return float(torch.linalg.vector_norm(values, dim=1).double().square().sum())
