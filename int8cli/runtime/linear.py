"""A linear layer that computes the exact LLM.int8() decomposition.

Owns the torch module around `llm_int8.matmul`. Does not know about files or models.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from int8cli.llm_int8.matmul import InputScheme, Int8Weight, llm_int8_linear


class Int8Linear(nn.Module):
    """X Wᵀ + b: stored columns in floats, the other columns in int8.

    Stored columns are removed from X before each token's scale is computed. Buffers: `weight` int8 (out_features,
    in_features), `row_absmax` float32 (out_features,), `outlier_cols` int32 (k,) sorted, `outlier_weight`
    (out_features, k) in its dtype on disk. The result has the dtype of the input and is rounded to it once, after the
    bias is added. For inference only: rounding has no gradient.
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
        """Allocate the weight and `columns` stored columns. Call `prepare` once they are filled."""
        super().__init__()
        self.in_features, self.out_features, self.inputs = in_features, out_features, inputs

        def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype, *, persistent: bool = True) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device), persistent=persistent)

        allocate("weight", (out_features, in_features), torch.int8)
        allocate("row_absmax", (out_features,), torch.float32)
        allocate("outlier_cols", (columns,), torch.int32)
        allocate("outlier_weight", (out_features, columns), columns_dtype)
        allocate("row_sums", (out_features,), torch.int32, persistent=False)
        self.bias = bias

    def prepare(self) -> None:
        """Compute the row sums of the weight, which every product needs."""
        self.row_sums = self.weight.sum(dim=1, dtype=torch.int32)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features)  # (tokens, in)
        weight = Int8Weight(self.weight, self.row_absmax, self.row_sums, self.outlier_cols.long(), self.outlier_weight)
        product = llm_int8_linear(rows, weight, self.inputs)  # (tokens, out), float32
        if self.bias is not None:
            product = product + self.bias
        return product.to(inputs.dtype).reshape(*inputs.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        """Move to another device with the model, but do not change dtypes when the model is cast."""

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
