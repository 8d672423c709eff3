"""A linear layer that computes the exact LLM.int8() decomposition.

Owns the torch module around `llm_int8.matmul`. Does not know about files or models.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from int8cli.errors import UnsupportedOperationError
from int8cli.llm_int8.baselines import restored_weight
from int8cli.llm_int8.cpu_product import laid_out
from int8cli.llm_int8.matmul import InputScheme, Int8Weight, input_gradient, llm_int8_linear
from int8cli.llm_int8.packed_weight import PackedWeight
from int8cli.runtime.guarded_int8 import GuardedInt8, PackedInt8


class Int8Linear(nn.Linear):
    """X Wᵀ + b: stored columns in floats, the other columns in int8.

    Stored columns are removed from X before each token's scale is computed. Buffers: `weight` int8 (out_features,
    in_features), `row_absmax` float32 (out_features,), `outlier_cols` int32 (k,) sorted, `outlier_weight`
    (out_features, k) in its dtype on disk, and those that `prepare` computes from them. On a processor `weight` may be
    packed, and is unpacked for whoever asks for it. The result has the dtype of the
    input and is rounded to it once, after the bias is added. The gradients of X and of the bias are those of a linear
    with the weight in floats (`dequantize`). The weight itself has no gradient.

    It is an nn.Linear for libraries that look for linears, such as PEFT.
    """

    row_absmax: Tensor
    outlier_cols: Tensor
    outlier_weight: Tensor
    step: Tensor
    row_sums: Tensor
    columns: Tensor
    column_weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        *,
        inputs: InputScheme,
        columns: int = 0,
        columns_dtype: torch.dtype = torch.float32,
        conv1d: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate the weight and `columns` stored columns. Call `prepare` once they are filled.

        `conv1d`: the model has transformers' Conv1D here, whose weight is (in_features, out_features).
        """
        nn.Module.__init__(self)  # that of nn.Linear would make a weight in floats
        self.in_features, self.out_features = in_features, out_features
        self.inputs, self.conv1d, self.prepared = inputs, conv1d, False
        self.packed: PackedWeight | None = None

        def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype, *, persistent: bool = True) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device), persistent=persistent)

        # Not registered as a buffer: `weight` is the property below.
        self._buffers["weight"] = torch.empty((out_features, in_features), dtype=torch.int8, device=device)
        allocate("row_absmax", (out_features,), torch.float32)
        allocate("outlier_cols", (columns,), torch.int32)
        allocate("outlier_weight", (out_features, columns), columns_dtype)
        allocate("step", (out_features,), torch.float32, persistent=False)
        allocate("row_sums", (out_features,), torch.int32, persistent=False)
        allocate("columns", (columns,), torch.int64, persistent=False)
        allocate("column_weight", (columns, out_features), torch.float32, persistent=False)
        self.bias = bias  # type: ignore[assignment]  # None too

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The int8 data, as what other libraries get to see of it."""
        data = self._buffers["weight"]
        return data if isinstance(data, PackedInt8) else GuardedInt8.of(self._data)

    @property
    def _data(self) -> Tensor:
        """The int8 data; unpacked into new memory if it is packed."""
        data = self._buffers["weight"] if self.packed is None else self.packed.unpacked()
        if data is None:
            raise UnsupportedOperationError(
                "this layer's weight is in memory only while its block runs: it is read for every token. "
                "int8cli.dequantize(DIR, OUT) writes all weights in floats; load_model without device_map holds them"
            )
        return data

    def take_weight(self, data: Tensor) -> None:
        """Have a weight until `drop_weight`; the first time, what follows from it is computed, and stays."""
        self._buffers["weight"] = data
        if not self.prepared:
            self._compute_constants(data)

    def drop_weight(self) -> None:
        self._buffers["weight"] = None

    def prepare(self, *, packing: bool = True) -> None:
        """Lay the weight out for fast products, and compute what follows from it.

        `packing`: on a processor, the weight may be packed. A weight that goes to a GPU should not be.
        """
        data = self._data
        self.packed = PackedWeight.of(data) if packing else None
        self._buffers["weight"] = laid_out(data) if self.packed is None else PackedInt8.around(self.packed)
        self._compute_constants(data)

    def _compute_constants(self, data: Tensor) -> None:
        made = Int8Weight.of(data, self.row_absmax, self.outlier_cols, self.outlier_weight, packed=self.packed)
        self.step, self.row_sums = made.step, made.row_sums
        self.columns, self.column_weight = made.outlier_cols, made.outlier_weight
        self.prepared = True

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.in_features)  # (tokens, in)
        data = self._data if self.packed is None else self.packed
        weight = (data, self.step, self.row_sums, self.columns, self.column_weight)
        if rows.requires_grad and torch.is_grad_enabled():
            product = _Product.apply(rows, self.inputs, *weight)  # type: ignore[no-untyped-call]
        else:
            product = llm_int8_linear(rows, Int8Weight(*weight), self.inputs)  # (tokens, out), float32
        if self.bias is not None:
            product = product + self.bias
        # Contiguous like nn.Linear's, which models rely on: Llama 4 views it as complex numbers.
        result: Tensor = product.to(inputs.dtype).contiguous().reshape(*inputs.shape[:-1], self.out_features)
        return result

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the layer computes with, stored columns exact: (out_features, in_features), without bias."""
        weight = restored_weight(self._data, self.row_absmax, dtype)
        return weight.index_copy_(1, self.outlier_cols.long(), self.outlier_weight.to(dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        """Move to another device with the model, but do not change dtypes when the model is cast.

        A packed weight stays so on the processor, and is unpacked for other devices.
        """

        def moved(tensor: Tensor) -> Tensor:
            if isinstance(tensor, PackedInt8) and fn(torch.empty(0, device="cpu")).device.type == "cpu":
                return tensor
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        if self.packed is not None and not isinstance(self._buffers["weight"], PackedInt8):
            self.packed, self.row_sums = None, self.row_sums.to(torch.int32)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """A packed weight does not change: it is unpacked for what is loaded, and packed again."""
        prepared, packing = self.prepared, self.packed is not None
        if packing:
            self._buffers["weight"], self.packed = self._data, None
        super()._load_from_state_dict(*args, **kwargs)
        if prepared:
            self.prepare(packing=packing)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: with the weight unpacked, which is packed again where the copy is made."""
        state = self.__dict__.copy()
        if self.packed is not None:
            state["packed"], state["_buffers"] = None, {**self._buffers, "weight": self._data}
        return {**state, "was_packed": self.packed is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        was_packed = state.pop("was_packed", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if was_packed:
            self.prepare()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"outlier_cols={self.outlier_cols.numel()}, inputs={self.inputs}"
        )


class _Product(torch.autograd.Function):
    """X Wᵀ whose gradient is that of the weight in floats: the rounding of X counts as the identity."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scheme: InputScheme, data: Tensor | PackedWeight, *constants: Tensor) -> Tensor:
        ctx.packed = data if isinstance(data, PackedWeight) else None
        ctx.save_for_backward(*constants, *([] if isinstance(data, PackedWeight) else [data]))
        ctx.dtype = rows.dtype
        return llm_int8_linear(rows, Int8Weight(data, *constants), scheme)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *constants, data = (*ctx.saved_tensors, ctx.packed) if ctx.packed is not None else ctx.saved_tensors
        weight = Int8Weight(data, *constants)
        return (input_gradient(gradient, weight).to(ctx.dtype), None, None, None, None, None, None)
