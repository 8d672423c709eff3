"""The methods of the table, each with the product it computes.

Their names and order are those of `results.method_names`. The arithmetic is that of `llm_int8`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from int8cli.evaluation.layers import Layer
from int8cli.llm_int8.baselines import (
    Span,
    bitsandbytes_linear,
    exact_columns_linear,
    matrix_product,
    outlier_columns,
    quantize_matrix,
)
from int8cli.llm_int8.matmul import InputScheme, Int8Weight, llm_int8_linear
from int8cli.results.evaluation import REFERENCE
from int8cli.results.method_names import METHOD_NAMES, chosen_keys

Product = Callable[[Layer, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table. `product(layer, inputs (tokens, in), bias)` returns the layer's output (tokens, out).

    `needs_weight`: int8 data and row_absmax alone are not enough. `needs_columns`: it uses stored columns.
    `needs_smoothing`: it uses the exponents of a calibration.
    """

    key: str
    label: str
    product: Product | None
    needs_weight: bool = True
    needs_columns: bool = False
    by_default: bool = True
    needs_smoothing: bool = False


def _by_scale(scheme: InputScheme, inputs_by: Span, weight_by: Span) -> Product:
    """A product of two int8 matrices: one scale for each row of X or for all of X, and the same for W."""

    def product(layer: Layer, inputs: Tensor, bias: Tensor | None) -> Tensor:
        matrix = layer.matrix(scheme, weight_by)
        return _biased(matrix_product(quantize_matrix(inputs, scheme, inputs_by), matrix), bias)

    return product


def _bitsandbytes(layer: Layer, inputs: Tensor, bias: Tensor | None) -> Tensor:
    return bitsandbytes_linear(inputs, layer.rows.data, layer.rows.row_absmax, layer.threshold, bias)


def _exact(layer: Layer, inputs: Tensor, bias: Tensor | None) -> Tensor:
    rows = layer.rows
    return _biased(exact_columns_linear(inputs, rows.data, rows.row_absmax, layer.weight, layer.threshold), bias)


def _whole(scheme: InputScheme) -> Product:
    def product(layer: Layer, inputs: Tensor, bias: Tensor | None) -> Tensor:
        weight = layer.with_columns(outlier_columns(inputs, layer.threshold))
        return _biased(llm_int8_linear(inputs, weight, scheme), bias)

    return product


def _stored(scheme: InputScheme) -> Product:
    def product(layer: Layer, inputs: Tensor, bias: Tensor | None) -> Tensor:
        return _biased(llm_int8_linear(inputs, layer.with_columns(), scheme), bias)

    return product


def _zero_point_inputs(layer: Layer, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """The product of loaders that round inputs with a zero point, and weights around zero."""
    weight = Int8Weight.of(layer.rows.data, layer.rows.row_absmax)
    return _biased(llm_int8_linear(inputs, weight, "zeropoint"), bias)


def _weights_only(layer: Layer, inputs: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(inputs, layer.restored(inputs.dtype), bias)


def _smoothed(product: Product) -> Product:
    """The product of the smoothed layer: what the product computes in a model whose folds are in its weights.

    There the producer divides the input. Both divisions are exact, so the layer gets the same bits.
    """

    def smoothed(layer: Layer, inputs: Tensor, bias: Tensor | None) -> Tensor:
        return product(layer.smoothed, layer.divided(inputs), bias)

    return smoothed


def _biased(output: Tensor, bias: Tensor | None) -> Tensor:
    return output if bias is None else output.add_(bias.to(torch.float32))


_PRODUCTS: dict[str, Product | None] = {
    REFERENCE: None,
    "absmax-tensor": _by_scale("absmax", "tensor", "tensor"),
    "zeropoint-tensor": _by_scale("zeropoint", "tensor", "tensor"),
    "absmax-row": _by_scale("absmax", "row", "tensor"),
    "absmax-weight-row": _by_scale("absmax", "tensor", "row"),
    "vector-wise": _by_scale("absmax", "row", "row"),
    "zeropoint-vector-wise": _by_scale("zeropoint", "row", "row"),
    "zeropoint-inputs": _zero_point_inputs,
    "bitsandbytes": _bitsandbytes,
    "llm-int8-exact": _exact,
    "llm-int8-whole": _whole("absmax"),
    "zeropoint-llm-int8": _whole("zeropoint"),
    "llm-int8-stored": _stored("absmax"),
    "zeropoint-llm-int8-stored": _stored("zeropoint"),
    "int8-weights": _weights_only,
    "smoothed-vector-wise": _smoothed(_by_scale("absmax", "row", "row")),
    "smoothed-zeropoint": _smoothed(_by_scale("zeropoint", "row", "row")),
    "smoothed-zeropoint-inputs": _smoothed(_zero_point_inputs),
    "smoothed-bitsandbytes": _smoothed(_bitsandbytes),
    "smoothed-stored": _smoothed(_stored("zeropoint")),
    "smoothed-int8-weights": _smoothed(_weights_only),
}
METHODS = tuple(
    Method(
        name.key,
        name.label,
        _PRODUCTS[name.key],
        name.needs_weight,
        name.needs_columns,
        name.by_default,
        name.needs_smoothing,
    )
    for name in METHOD_NAMES
)


def chosen_methods(keys: Iterable[str]) -> tuple[Method, ...]:
    """The methods of these names in the table's order, as `chosen_keys` has it. Raises UnknownMethodError."""
    chosen = chosen_keys(keys)
    return tuple(method for method in METHODS if method.key in chosen)
