"""The methods of the table: their names, what each needs, and the product it computes.

Owns which methods exist, and their order. The arithmetic is in `llm_int8`.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from int8cli.errors import UnknownMethodError
from int8cli.evaluation.layers import Layer
from int8cli.llm_int8.baselines import (
    Span,
    bitsandbytes_linear,
    exact_columns_linear,
    matrix_product,
    outlier_columns,
    quantize_matrix,
)
from int8cli.llm_int8.matmul import InputScheme, llm_int8_linear
from int8cli.results.evaluation import REFERENCE

Product = Callable[[Layer, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table. `product(layer, inputs (tokens, in), bias)` returns the layer's output (tokens, out).

    `needs_weight`: int8 data and row_absmax alone are not enough. `needs_columns`: it uses stored columns.
    """

    key: str
    label: str
    product: Product | None
    needs_weight: bool = True
    needs_columns: bool = False
    by_default: bool = True


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


def _weights_only(layer: Layer, inputs: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(inputs, layer.restored(inputs.dtype), bias)


def _biased(output: Tensor, bias: Tensor | None) -> Tensor:
    return output if bias is None else output.add_(bias.to(torch.float32))


# "By row" means by row of X, one scale per token, with one scale for all of W, as in table 1 of the paper.
METHODS = (
    Method(REFERENCE, "16 bit", None),
    Method("absmax-tensor", "absmax by tensor", _by_scale("absmax", "tensor", "tensor")),
    Method("zeropoint-tensor", "zero-point by tensor", _by_scale("zeropoint", "tensor", "tensor")),
    Method("absmax-row", "absmax by row", _by_scale("absmax", "row", "tensor")),
    Method("absmax-weight-row", "absmax by row of W", _by_scale("absmax", "tensor", "row"), by_default=False),
    Method("vector-wise", "vector-wise", _by_scale("absmax", "row", "row")),
    Method("zeropoint-vector-wise", "zero-point vector-wise", _by_scale("zeropoint", "row", "row")),
    Method("bitsandbytes", "LLM.int8(), bitsandbytes", _bitsandbytes, needs_weight=False),
    Method("llm-int8-exact", "LLM.int8(), exact columns", _exact),
    Method("llm-int8-whole", "LLM.int8(), whole columns", _whole("absmax"), by_default=False),
    Method("zeropoint-llm-int8", "zero-point LLM.int8()", _whole("zeropoint"), by_default=False),
    Method("llm-int8-stored", "LLM.int8(), stored columns", _stored("absmax"), needs_weight=False, needs_columns=True),
    Method(
        "zeropoint-llm-int8-stored",
        "zero-point, stored columns",
        _stored("zeropoint"),
        needs_weight=False,
        needs_columns=True,
    ),
    Method("int8-weights", "int8 weights, 16-bit inputs", _weights_only, needs_weight=False),
)
_BY_KEY = {method.key: method for method in METHODS}


def chosen_methods(keys: Iterable[str]) -> tuple[Method, ...]:
    """The methods with these names, in the table's order. No names mean the default methods, "all" means every method.

    Raises UnknownMethodError.
    """
    wanted = list(dict.fromkeys(keys))
    if not wanted:
        return tuple(method for method in METHODS if method.by_default)
    if "all" in wanted:
        return METHODS
    for key in wanted:
        if key not in _BY_KEY:
            raise UnknownMethodError(f"unknown method {key!r}", hint=_nearest(key))
    return tuple(method for method in METHODS if method.key in wanted)


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key.lower(), _BY_KEY, n=1, cutoff=0.5)
    listed = ", ".join(_BY_KEY)
    return f"Did you mean {close[0]}? The methods are: {listed}." if close else f"The methods are: {listed}."
