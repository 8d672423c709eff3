"""An int8 weight in the memory layout of FBGEMM, which torch ships for x86: packed once, not in each product.

Owns that layout, and when it is used: only where its sums are exact. `torch._int_mm` has oneDNN pack the weight anew in
each call of several tokens, which for 8 tokens takes longer than the product. The other kernels that torch ships were
slower or not exact: docs/benchmarks.md has the table.
"""

import mmap
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from int8cli.llm_int8.cpu_product import cpu_product

# Whole numbers up to here are exact in float32.
_EXACT_IN_FLOAT = 1 << 24
_LARGEST_INPUT = 128
# FBGEMM wants unsigned inputs: what it adds to ours.
_OFFSET = 128
_ENGINE = "fbgemm"

# Rows whose magnitudes are summed at once: memory that is touched for the first time takes longer than the sum.
_BLOCK_ELEMENTS = 1 << 19
# What packing takes at once: a quantized copy and the packed one, which is padded.
_PACKING_COPIES, _PACKING_BYTES = 2, 1 << 20

_keys = count()
_by_key: "WeakValueDictionary[int, PackedWeight]" = WeakValueDictionary()


class PackedWeight:
    """int8 (out_features, in_features), packed. It does not change, so that any number of layers may share it.

    FBGEMM returns its int32 sums as float32, which holds them exactly up to 2^24. A weight whose sums could be larger
    is cut into parts along in_features, each of which stays below that; the sums of the parts are added in int32.
    """

    def __init__(self, parts: tuple[Any, ...], shape: tuple[int, int]) -> None:
        self._parts, self.shape = parts, shape
        self._width = -(-shape[1] // len(parts))
        self.key = next(_keys)
        _by_key[self.key] = self

    @classmethod
    def of(cls, data: Tensor) -> "PackedWeight | None":
        """The weight packed, or None where torch has no such product, its sums are not exact, or memory is short."""
        if data.device.type != "cpu" or 0 in data.shape:
            return None
        try:
            if not is_supported() or (width := _exact_width(data)) == 0:
                return None
            parts = tuple(_packed(part) for part in torch.split(data, width, dim=1))
        except (AttributeError, NotImplementedError, OSError, RuntimeError):
            return None
        return cls(parts, (data.shape[0], data.shape[1]))

    @property
    def in_one_part(self) -> bool:
        return len(self._parts) == 1

    def product(self, values: Tensor) -> Tensor:
        """values (tokens, in_features) times the weight transposed, exact: (tokens, out_features).

        values: float32, whole numbers; those beyond int8 are clamped to it. The result holds whole numbers in float32
        if the weight is in one part, and is int32 otherwise.
        """
        if torch.compiler.is_compiling():
            compiled: Tensor = _product_by_key(values, self.key, self.shape[0], self.in_one_part)
            return compiled
        if not values.shape[0]:
            return values.new_empty((0, self.shape[0]), dtype=torch.float32 if self.in_one_part else torch.int32)
        if self.in_one_part:
            return _multiplied(values, self._parts[0])
        total = values.new_zeros((values.shape[0], self.shape[0]), dtype=torch.int32)
        for columns, part in zip(torch.split(values, self._width, dim=1), self._parts, strict=True):
            total += _multiplied(columns.contiguous(), part).to(torch.int32)
        return total

    def unpacked(self) -> Tensor:
        """The weight itself, in new memory: int8 (out_features, in_features)."""
        parts = [_unpacked(part) for part in self._parts]
        return parts[0] if self.in_one_part else torch.cat(parts, dim=1)


@cache
def is_supported() -> bool:
    """Whether this torch has the product, and this processor computes it exactly.

    Without VNNI, FBGEMM adds pairs of products in 16 bit, where the largest ones do not fit. torch has announced that
    it will drop the tensors that weights are packed from: whatever it raises then, there is no such product. Raises
    OSError where the system has no memory to find out, and is asked again the next time.
    """
    try:
        return _is_exact()
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def _is_exact() -> bool:
    if not hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32"):
        return False
    if _ENGINE not in torch.backends.quantized.supported_engines or not hasattr(
        torch, "_make_per_tensor_quantized_tensor"
    ):
        return False
    width = 64
    extremes = torch.tensor([127, -127, 127, -128], dtype=torch.int8, device="cpu")[:, None].expand(4, width)
    packed = _packed(extremes)
    if not torch.equal(_unpacked(packed), extremes):
        return False
    values = extremes.double()
    beyond = values + values.sign() * torch.arange(width, device="cpu").remainder(3)
    return torch.equal(_multiplied(beyond.float(), packed).double(), beyond.clamp(-128, 127) @ values.t())


def _exact_width(data: Tensor) -> int:
    """The largest width of parts, of equal width but for the last, in which no sum can exceed 2^24. 0 if there is none.

    A sum of products is at most 128 times the sum of a row's magnitudes.
    """
    in_features = data.shape[1]
    for parts in range(1, 1 + -(-in_features * _LARGEST_INPUT * _LARGEST_INPUT // _EXACT_IN_FLOAT)):
        width = -(-in_features // parts)
        if all(_largest_sum(part) <= _EXACT_IN_FLOAT for part in torch.split(data, width, dim=1)):
            return width
    return 0


def _largest_sum(part: Tensor) -> int:
    """A bound of the largest sum of products of one row, at least 128 times the sum of its magnitudes."""
    width = part.shape[1]
    if width * _LARGEST_INPUT * _LARGEST_INPUT <= _EXACT_IN_FLOAT:
        return width * _LARGEST_INPUT * _LARGEST_INPUT
    ones, largest = part.new_ones(1, width), 0
    for rows in torch.split(part, max(2, _BLOCK_ELEMENTS // width)):
        magnitudes = rows.clamp(min=-127).abs_()  # -128 has no magnitude in int8: each value may lack 1
        largest = max(largest, int(cpu_product(ones, magnitudes).max()))
    return _LARGEST_INPUT * (largest + width)


def _packed(data: Tensor) -> Any:
    """Raises OSError where the system would refuse the memory: FBGEMM does not check, and the process crashes."""
    room = _PACKING_COPIES * data.numel() + _PACKING_BYTES
    mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON).close()  # malloc would remember the size, and keep more
    with _engine.selected():
        return torch.ops.quantized.linear_prepack(_as_quantized(data.contiguous()), None)


def _as_quantized(data: Tensor) -> Tensor:
    """torch announces, in a warning, that it will drop these tensors. Without them, there is no packing."""
    with _warnings, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch._make_per_tensor_quantized_tensor(data, 1.0, 0)


_warnings = threading.Lock()  # filters of warnings are a setting of the process


class _Engine:
    """FBGEMM as the engine that torch packs for, which is a setting of the process, while any thread packs."""

    def __init__(self) -> None:
        self._lock, self._threads, self._before = threading.Lock(), 0, ""

    @contextmanager
    def selected(self) -> Iterator[None]:
        with self._lock:
            if not self._threads:
                self._before = torch.backends.quantized.engine
                torch.backends.quantized.engine = _ENGINE
            self._threads += 1
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if not self._threads:
                    torch.backends.quantized.engine = self._before


_engine = _Engine()


def _unpacked(part: Any) -> Tensor:
    data: Tensor = torch.ops.quantized.linear_unpack(part)[0].int_repr()
    return data


def _multiplied(values: Tensor, part: Any) -> Tensor:
    """float32 in, float32 out: values are made uint8 by adding 128, which the product corrects in int32."""
    product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(values, 1.0, _OFFSET, part)
    return product


@torch.library.custom_op("int8cli::packed_product", mutates_args=())
def _product_by_key(values: Tensor, key: int, outputs: int, in_one_part: bool) -> Tensor:
    """`PackedWeight.product` for torch.compile, which cannot look into what is packed."""
    return _by_key[key].product(values)


@_product_by_key.register_fake
def _(values: Tensor, key: int, outputs: int, in_one_part: bool) -> Tensor:
    return values.new_empty((values.shape[0], outputs), dtype=torch.float32 if in_one_part else torch.int32)
