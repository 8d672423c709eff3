"""A linear layer that computes the exact LLM.int8() decomposition.

Owns the torch module around `llm_int8.matmul`. Knows no file and no model.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from int8cli.llm_int8.matmul import InputScheme, Int8Weight, llm_int8_linear


class Int8Linear(nn.Module):
    """X Wᵀ + b: stored columns in floats, taken out of X before a token's scale is computed, the others in int8.

    Buffers: `weight` int8 (out_features, in_features), `row_absmax` float32 (out_features,), `outlier_cols` int32 (k,)
    sorted, `outlier_weight` (out_features, k) in the dtype it is stored in. The result has the dtype of the input and
    is rounded to it once, bias included. For inference: rounding has no gradient.
    """

    weight: Tensor
    row_absmax: Tensor
    outlier_cols: Tensor
    outlier_weight: Tensor
    row_sums: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        *,
        inputs: InputScheme,
        columns: int = 0,
        columns_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Room for the weight and `columns` stored columns; `prepare` is to be called once they are there."""
        super().__init__()
        self.in_features, self.out_features, self.inputs = in_features, out_features, inputs

        def room(name: str, shape: tuple[int, ...], dtype: torch.dtype, *, persistent: bool = True) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device), persistent=persistent)

        room("weight", (out_features, in_features), torch.int8)
        room("row_absmax", (out_features,), torch.float32)
        room("outlier_cols", (columns,), torch.int32)
        room("outlier_weight", (out_features, columns), columns_dtype)
        room("row_sums", (out_features,), torch.int32, persistent=False)
        self.bias = bias

    def prepare(self) -> None:
        """Compute what follows from the weight and is needed for every product."""
        self.row_sums = self.weight.sum(dim=1, dtype=torch.int32)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features)  # (tokens, in)
        weight = Int8Weight(self.weight, self.row_absmax, self.row_sums, self.outlier_cols.long(), self.outlier_weight)
        product = llm_int8_linear(rows, weight, self.inputs)  # (tokens, out), float32
        if self.bias is not None:
            product = product + self.bias
        return product.to(inputs.dtype).reshape(*inputs.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        """Move with the model, but keep all dtypes when it is cast: scales and stored columns are what was written."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"outlier_cols={self.outlier_cols.numel()}, inputs={self.inputs}"
        )
