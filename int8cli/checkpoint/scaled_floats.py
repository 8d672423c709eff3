"""Tensors of 8-bit floats with scales, read as the floats that they stand for.

Owns the arithmetic, which is that of transformers' dequantization (integrations/finegrained_fp8.py, `Fp8Dequantize`):
both factors in float32, one product, rounded to the dtype of the result. Reads only the scales of the rows at hand.
"""

from functools import cache

import torch
from torch import Tensor

from int8cli.checkpoint.reader import ShardReader
from int8cli.checkpoint.tensor import DTYPE_BITS, Scaled, ShardContents, StoredTensor
from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES

_EXPONENT_BIAS = 127.0


class ScaledFloats:
    """Turns the codes of one shard into floats. Reuses its memory: each thread needs its own."""

    def __init__(self, reader: ShardReader, contents: ShardContents) -> None:
        self._reader, self._file_name, self._borrowed = reader, contents.file_name, contents.borrowed
        self._indices = torch.empty(0, dtype=torch.int32)
        self._products = torch.empty(0)
        self._result = torch.empty(0)

    def floats(self, stored: StoredTensor, codes: Tensor, row: int, column: int, *, turned: bool = False) -> Tensor:
        """What a rectangle of codes (rows, columns) from `row`, `column` on stands for, in `stored`'s dtype.

        Contiguous; on the CPU valid until the next call. `turned`: it is a rectangle of the transpose of the matrix
        that has the scales. Raises CorruptShardError if the scales cannot be read.
        """
        assert stored.scaled is not None
        products = self._in_float32(codes)
        if turned:
            self._multiply(stored.scaled, products.t(), column, row)
        else:
            self._multiply(stored.scaled, products, row, column)
        dtype = TORCH_DTYPES[stored.spec.dtype]
        if codes.device.type != "cpu" or dtype == torch.float32:
            return products.to(dtype)
        if self._result.dtype != dtype or self._result.numel() < products.numel():
            self._result = torch.empty(products.numel(), dtype=dtype)
        return self._result[: products.numel()].view(products.shape).copy_(products)

    def _in_float32(self, codes: Tensor) -> Tensor:
        """The codes' own values. On the CPU by a table, which is five times faster than torch's cast (0.4 against
        0.08 billion a second)."""
        if codes.device.type != "cpu":
            return codes.float()
        count = codes.numel()
        if self._products.numel() < count:
            self._indices, self._products = torch.empty(count, dtype=torch.int32), torch.empty(count)
        indices, products = self._indices[:count], self._products[:count]
        indices.copy_(codes.view(torch.uint8).reshape(-1))
        torch.index_select(_values_of(codes.dtype), 0, indices, out=products)
        return products.view(codes.shape)

    def _multiply(self, scaled: Scaled, values: Tensor, row: int, column: int) -> None:
        """Multiply values (rows, columns), in the orientation of the codes' matrix, by their scales, in place."""
        row, column = row + scaled.first[0], column + scaled.first[1]
        end = row + values.shape[0]
        first_grid_row = scaled.grid_row(row)
        grid = self._grid_rows(scaled, first_grid_row, scaled.grid_row(end - 1) + 1).to(values.device)
        if scaled.grid_columns > 1:
            columns = torch.arange(column, column + values.shape[1], device=values.device) // scaled.block[1]
            grid = grid.index_select(1, columns)
        if scaled.block[0] == 1:
            values.mul_(grid)
            return
        start = row
        while start < end:
            stop = min(end, scaled.group_end(start))
            values[start - row : stop - row].mul_(grid[scaled.grid_row(start) - first_grid_row])
            start = stop

    def _grid_rows(self, scaled: Scaled, first: int, end: int) -> Tensor:
        """Rows of scales: float32 (end - first, grid_columns)."""
        spec = scaled.scales.spec
        row_bytes = scaled.grid_columns * DTYPE_BITS[spec.dtype] // 8
        if scaled.scales_file == self._file_name:
            memory = bytearray((end - first) * row_bytes)
            self._reader.read_into(scaled.scales.offset_bytes + first * row_bytes, memoryview(memory))
        else:
            memory = bytearray(self._borrowed[spec.name][first * row_bytes : end * row_bytes])
        stored = torch.frombuffer(memory, dtype=TORCH_DTYPES[spec.dtype]).view(end - first, scaled.grid_columns)
        return (stored.float() - _EXPONENT_BIAS).exp2() if scaled.exponents else stored.float()


@cache
def _values_of(dtype: torch.dtype) -> Tensor:
    """The value of each of the 256 codes: float32 (256,)."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()
