"""The memory that a pass uses: the buffers of each thread, and tiles that threads share for transposed tensors.

Owns how a rectangle of a tensor is read into memory, in either orientation, and copied to the device that computes.
"""

import ctypes
import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from int8cli.checkpoint.reader import ShardReader
from int8cli.checkpoint.scaled_floats import ScaledFloats
from int8cli.checkpoint.tensor import ShardContents, StoredTensor
from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES
from int8cli.llm_int8.quantize import BlockQuantizer, NonFiniteWeightError
from int8cli.planning.blocks import (
    BLOCK_ELEMENTS,
    CROSSWISE_BYTES_A_THREAD,
    TILE_BYTES,
    TILES_AT_ONCE,
    Matrix,
    Rectangle,
)


class Buffer:
    """Memory that can be used as bytes, for I/O, and as tensors, for arithmetic. Allocated once.

    The memory is mapped, for two reasons. Pages that are never touched use no memory: a buffer is large enough for
    64-bit weights, and 16-bit weights use a quarter of it. And all buffers have the same alignment, so no sum depends
    on the address. A `pinned` buffer is page-locked instead, so that a GPU can copy while the processor does other
    work.
    """

    def __init__(self, size_bytes: int, *, pinned: bool = False) -> None:
        if pinned:
            self._tensor = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
            self.bytes = bytes_of(self._tensor)
        else:
            memory = mmap.mmap(-1, size_bytes)
            self.bytes = memoryview(memory)
            self._tensor = torch.frombuffer(memory, dtype=torch.uint8)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The first bytes of the buffer as a contiguous tensor of this dtype and shape."""
        numel = 1
        for size in shape:
            numel *= size
        return self._tensor[: numel * dtype.itemsize].view(dtype).view(shape)


def bytes_of(tensor: Tensor) -> memoryview:
    """A view of the memory of a contiguous uint8 tensor. The tensor must outlive the view."""
    return memoryview((ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())).cast("B")


class CrosswiseTiles:
    """Tiles of tensors that are stored transposed, read once and shared by the threads of a pass.

    A block of such a tensor is a narrow strip of the file, so reading block by block would need a read for every few
    hundred bytes. A tile spans the strips of many blocks. The last two tiles stay in memory, because different threads
    may be on both sides of a border.
    """

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._tiles: OrderedDict[tuple[StoredTensor, Rectangle], Tensor] = OrderedDict()
        self._buffers: list[Buffer] = []

    def copy(self, matrix: Matrix, part: Rectangle, strip: Tensor) -> None:
        """Fill `strip` (columns, rows) with a rectangle in the orientation of the file."""
        width_bytes = strip.dtype.itemsize
        tile_rows = max(part.rows, TILE_BYTES // (part.columns * width_bytes))
        first_row = part.row // tile_rows * tile_rows
        last_row = min(matrix.out_features, first_row + tile_rows)
        if part.row + part.rows > last_row:  # a block that crosses a border gets a tile of its own
            first_row, last_row = part.row, part.row + part.rows
        area = Rectangle(first_row, last_row - first_row, part.column, part.columns)
        with self._lock:
            start = part.row - first_row
            strip.copy_(self._tile(matrix, area, strip.dtype)[:, start : start + part.rows])

    def _tile(self, matrix: Matrix, area: Rectangle, dtype: torch.dtype) -> Tensor:
        """The tile (columns, rows) in the orientation of the file. Reads it if needed, in place of the oldest tile."""
        key = (matrix.stored, area)
        if key not in self._tiles:
            self._tiles[key] = self._read(self._free_buffer(), matrix, area, dtype)
        return self._tiles[key]

    def _free_buffer(self) -> Buffer:
        if len(self._buffers) < TILES_AT_ONCE:
            self._buffers.append(Buffer(TILE_BYTES))
        else:
            self._buffers.append(self._buffers.pop(0))
            while len(self._tiles) >= TILES_AT_ONCE:
                self._tiles.popitem(last=False)
        return self._buffers[-1]

    def _read(self, buffer: Buffer, matrix: Matrix, area: Rectangle, dtype: torch.dtype) -> Tensor:
        run = area.rows * dtype.itemsize
        pitch = matrix.stored.pitch or matrix.out_features
        start = matrix.stored.offset_bytes + (area.column * pitch + area.row) * dtype.itemsize
        if area.rows == pitch:
            self._reader.read_into(start, buffer.bytes[: area.columns * run])
        else:
            stride = pitch * dtype.itemsize
            for index in range(area.columns):
                self._reader.read_into(start + index * stride, buffer.bytes[index * run : (index + 1) * run])
        return buffer.tensor(dtype, (area.columns, area.rows))


class Workbench:
    """The buffers of one thread: a block in the source's dtype, its int8 data, and its scales or its cast form.

    For a GPU, the buffers are pinned, and each thread has its own stream: while one block is copied, another can be
    computed and a third read from disk.
    """

    def __init__(
        self, reader: ShardReader, contents: ShardContents, tiles: CrosswiseTiles, quantizer: BlockQuantizer
    ) -> None:
        on_gpu = quantizer.device.type == "cuda"
        self.source = Buffer(BLOCK_ELEMENTS * 8, pinned=on_gpu)
        self.data = Buffer(BLOCK_ELEMENTS, pinned=on_gpu)
        self.scales = Buffer(BLOCK_ELEMENTS * 4, pinned=on_gpu)
        self.quantizer = quantizer
        self._reader = reader
        self._scaled = ScaledFloats(reader, contents)
        self._tiles = tiles
        self._strip: Buffer | None = None
        self._gathered: Buffer | None = None
        self._copy: Buffer | None = None
        self._stream = _new_stream(quantizer.device) if on_gpu else None
        self._on_gpu = torch.empty(BLOCK_ELEMENTS * 4, dtype=torch.uint8, device=quantizer.device) if on_gpu else None

    def in_stream(self) -> AbstractContextManager[object]:
        """A context in which this thread must do its arithmetic."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def settle(self) -> None:
        """Wait until the GPU has finished this thread's work, so that other threads may use the result."""
        if self._stream is not None:
            self._stream.synchronize()

    def gather(self, loaded: Tensor, columns: Tensor) -> memoryview:
        """The bytes of some columns (k,) of a rectangle (rows, columns), row-major (rows, k)."""
        rows, count = loaded.shape[0], columns.numel()
        size_bytes = rows * count * loaded.dtype.itemsize
        if self._gathered is None or len(self._gathered.bytes) < size_bytes:
            self._gathered = Buffer(size_bytes)
        self._gathered.tensor(loaded.dtype, (rows, count)).copy_(loaded.index_select(1, columns))
        return self._gathered.bytes[:size_bytes]

    def copy_like(self, loaded: Tensor) -> Tensor:
        """A place for a changed copy of a loaded rectangle, which the next copy overwrites; on a GPU the rectangle."""
        if self._on_gpu is not None:
            return loaded
        if self._copy is None:
            self._copy = Buffer(BLOCK_ELEMENTS * 8)
        return self._copy.tensor(loaded.dtype, tuple(loaded.shape))

    def read(self, offset_bytes: int, size_bytes: int) -> memoryview:
        """Read bytes of the source file into the source buffer."""
        data = self.source.bytes[:size_bytes]
        self._reader.read_into(offset_bytes, data)
        return data

    def load(self, matrix: Matrix, part: Rectangle) -> Tensor:
        """Read a rectangle of floats: contiguous (rows, columns), in the tensor's dtype, on the quantizer's device.

        Goes through the source buffer. The previous rectangle is overwritten, in the buffer and on the device.
        """
        dtype = TORCH_DTYPES[matrix.stored.file_dtype]
        if self._on_gpu is None:
            return self._as_floats(matrix, part, self.load_here(matrix, part, dtype))
        self.settle()  # the GPU may still be copying the previous block from the buffer
        loaded = self.load_here(matrix, part, dtype)
        there = self._on_gpu[: part.numel * dtype.itemsize].view(dtype).view(loaded.shape)
        return self._as_floats(matrix, part, there.copy_(loaded, non_blocking=True))

    def load_floats_here(self, matrix: Matrix, part: Rectangle) -> Tensor:
        """Read a rectangle of floats, in the tensor's dtype: contiguous (rows, columns), on the CPU."""
        return self._as_floats(matrix, part, self.load_here(matrix, part, TORCH_DTYPES[matrix.stored.file_dtype]))

    def _as_floats(self, matrix: Matrix, part: Rectangle, loaded: Tensor) -> Tensor:
        """What the bytes of a rectangle stand for: themselves, unless they are codes with scales."""
        if matrix.stored.scaled is None:
            return loaded
        return self._scaled.floats(matrix.stored, loaded, part.row, part.column, turned=matrix.turned)

    def load_here(self, matrix: Matrix, part: Rectangle, dtype: torch.dtype) -> Tensor:
        """Read a rectangle into the source buffer: contiguous (rows, columns)."""
        loaded = self.source.tensor(dtype, (part.rows, part.columns))
        if matrix.crosswise:
            # In two steps: torch transposes a contiguous matrix ten times faster than a part of a wider one.
            strip = self._strip_buffer().tensor(dtype, (part.columns, part.rows))
            self._tiles.copy(matrix, part, strip)
            loaded.copy_(strip.t())
        else:
            self.read(*matrix.run(part))
        return loaded

    def _strip_buffer(self) -> Buffer:
        """The buffer for transposed tensors. Allocated on first use, because few checkpoints have any."""
        if self._strip is None:
            self._strip = Buffer(CROSSWISE_BYTES_A_THREAD)
        return self._strip

    def source_run(self, matrix: Matrix, part: Rectangle) -> tuple[int, memoryview] | None:
        """The offset and the bytes of the last loaded rectangle in the file, if they are contiguous there."""
        if matrix.crosswise:
            return None
        offset_bytes, size_bytes = matrix.run(part)
        return offset_bytes, self.source.bytes[:size_bytes]


class WideRowAbsmax:
    """The absmax of the current row, if rows are wider than a block. One scan per row, shared by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._row: tuple[StoredTensor, int] | None = None
        self._absmax: Tensor | None = None

    def get(self, bench: Workbench, matrix: Matrix, row: int, load: Callable[[Rectangle], Tensor]) -> Tensor:
        """The absmax, float32 (1,). `load` reads a piece of the row and overwrites the buffers of `bench`.

        Raises NonFiniteWeightError with a column of the whole row.
        """
        with self._lock:
            if self._absmax is None or self._row != (matrix.stored, row):
                self._absmax = _scan(bench, matrix, row, load)
                bench.settle()
                self._row = (matrix.stored, row)
            return self._absmax


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _scan(bench: Workbench, matrix: Matrix, row: int, load: Callable[[Rectangle], Tensor]) -> Tensor:
    pieces = []
    for piece in matrix.row_pieces(row):
        try:
            pieces.append(bench.quantizer.row_absmax(load(piece)))
        except NonFiniteWeightError as found:
            raise NonFiniteWeightError(0, piece.column + found.column, found.value) from None
    return torch.stack(pieces).amax(dim=0)
