"""The int8 data of a layer, as a tensor that refuses to be taken for floats.

Owns that refusal. Libraries that know `nn.Linear` but not int8 read and write `weight` itself: PEFT merges an adapter
by adding to it (in int8 the sum would be the old weight, without an error), and DoRA takes its norms.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from int8cli.errors import UnsupportedOperationError
from int8cli.llm_int8.packed_weight import PackedWeight

_REFUSAL = (
    "an int8 weight cannot be changed, or taken for one in floats, as merging an adapter and DoRA do: "
    "load_model(DIR).dequantize() is the same model with ordinary linear layers"
)


class GuardedInt8(Tensor):
    """int8 (out_features, in_features). Computes as any other tensor, and results are ordinary tensors.

    Raises UnsupportedOperationError for `data`, which is there to be written to, and for casts to floats: without its
    scales the data says nothing about a weight's size.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, data: Tensor) -> "GuardedInt8":
        """A view of the same memory, with what others have noted on the tensor, as transformers does."""
        view = data.as_subclass(cls)
        view.__dict__.update(data.__dict__)
        return view

    def plain(self) -> Tensor:
        return self.as_subclass(Tensor)

    @property
    def data(self) -> Tensor:
        raise UnsupportedOperationError(_REFUSAL)

    @data.setter
    def data(self, _: Tensor) -> None:
        raise UnsupportedOperationError(_REFUSAL)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        result = self.plain().to(*args, **kwargs)
        if result.dtype.is_floating_point:
            raise UnsupportedOperationError(_REFUSAL)
        return result


class PackedInt8(GuardedInt8):
    """The same for data that is packed. Its shape and dtype are known; whatever needs the data gets it unpacked."""

    packed: PackedWeight

    @staticmethod
    def around(packed: PackedWeight) -> "PackedInt8":
        made = torch.Tensor._make_wrapper_subclass(PackedInt8, packed.shape, dtype=torch.int8)
        assert isinstance(made, PackedInt8)
        made.packed = packed
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:  # it would change a copy
            raise UnsupportedOperationError(_REFUSAL)
        plain: Callable[[Any], Any] = lambda tree: tree_map_only(PackedInt8, PackedInt8.plain, tree)  # noqa: E731
        return func(*plain(args), **plain(kwargs or {}))

    def plain(self) -> Tensor:
        return self.packed.unpacked()

    def numpy(self, *, force: bool = False) -> Any:
        return self.plain().numpy(force=force)

    def tolist(self) -> Any:
        return self.plain().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.plain()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedInt8{tuple(self.shape)}"
