"""How a shard is cut into blocks, so that no whole tensor is ever in memory.

Owns the size and shape of a block, which is a rectangle of one tensor in the shape of the output. The cut depends on
the tensor alone, not on the number of threads, so every run adds the same sums in the same order.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from int8cli.checkpoint.tensor import ShardContents, StoredTensor
from int8cli.llm_int8.limits import EXACT_STEPS, FINE_STEPS, Steps
from int8cli.planning.decisions import Decision

# 512K elements: the buffers of one block (1 MB of 16-bit input, twice 2 MB of float32, 512 KB of int8) stay in the
# last-level cache, and 512 KB is the largest write that reaches the page cache's full speed.
BLOCK_ELEMENTS = 1 << 19
COPY_BYTES = 1 << 19
# Bytes read at once of a tensor that is stored transposed, and how many such tiles the threads of a process share.
TILE_BYTES = 1 << 24
TILES_AT_ONCE = 2
# The most threads over the blocks of one shard. More would wait for the interpreter's lock and the file's.
THREADS_FOR_A_SHARD = 4
# The buffers of one thread, in bytes for each element of a block: source 8 (the widest dtype), float32 scaled and
# rounded 4 + 4, int8 data 1, scales 4 (a block may have one column).
BUFFER_BYTES_A_THREAD = BLOCK_ELEMENTS * (8 + 4 + 4 + 1 + 4)
# And of one that smooths: a copy of the block in the source's dtype, and for scales that are no powers of two one in a
# wider dtype.
SMOOTHING_BYTES_A_THREAD: Mapping[Steps, int] = {EXACT_STEPS: BLOCK_ELEMENTS * 8, FINE_STEPS: BLOCK_ELEMENTS * 16}
# And of one that reads a tensor which is stored transposed: a block in the orientation of the file.
CROSSWISE_BYTES_A_THREAD = BLOCK_ELEMENTS * 8
# And of one that reads 8-bit floats with scales: indices, products in float32, and the result in 16 bit.
SCALED_BYTES_A_THREAD = BLOCK_ELEMENTS * (4 + 4 + 2)


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Rows [row, row + rows) and columns [column, column + columns) of a tensor seen as (out_features, in_features)."""

    row: int
    rows: int
    column: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Matrix:
    """A 2-D tensor in the shape of the output, and the order of its bytes in the source.

    `out_features` x `in_features`, row-major in the output. `crosswise`: the source stores the transpose, as with a
    Conv1D weight, or a linear weight that a `.bin` stores transposed. `turned`: the scales of a scaled tensor are those
    of the transpose.
    """

    stored: StoredTensor
    out_features: int
    in_features: int
    crosswise: bool
    turned: bool = False

    @classmethod
    def of(cls, stored: StoredTensor, *, transpose: bool) -> "Matrix":
        first, second = stored.spec.shape
        out_features, in_features = (second, first) if transpose else (first, second)
        turned = stored.scaled is not None and transpose != stored.scaled.turned
        return cls(stored, out_features, in_features, transpose != stored.column_major, turned)

    @classmethod
    def flat(cls, stored: StoredTensor) -> "Matrix":
        """A row-major tensor of any shape as one row; a scaled one as the rows of all its matrices."""
        if stored.scaled is not None:
            columns = stored.spec.shape[-1]
            return cls(stored, stored.spec.numel // columns, columns, False)
        return cls(stored, 1, stored.spec.numel, False)

    def run(self, part: Rectangle) -> tuple[int, int]:
        """Offset and size in bytes of a rectangle that is contiguous in the file: whole rows, or part of one row."""
        width_bytes = self.stored.file_nbytes // self.stored.spec.numel
        start = part.row * self.in_features + part.column
        return self.stored.offset_bytes + start * width_bytes, part.numel * width_bytes

    def rectangles(self) -> Iterator[Rectangle]:
        """Rectangles of whole rows, as many as fit into a block. A row wider than a block is cut by columns."""
        if self.in_features > BLOCK_ELEMENTS:
            for row in range(self.out_features):
                yield from self.row_pieces(row)
            return
        rows = BLOCK_ELEMENTS // self.in_features
        for row in range(0, self.out_features, rows):
            yield Rectangle(row, min(rows, self.out_features - row), 0, self.in_features)

    def row_pieces(self, row: int) -> Iterator[Rectangle]:
        """One row in pieces of at most a block."""
        for column in range(0, self.in_features, BLOCK_ELEMENTS):
            yield Rectangle(row, 1, column, min(BLOCK_ELEMENTS, self.in_features - column))


@dataclass(frozen=True, slots=True)
class _MatrixBlock:
    matrix: Matrix
    part: Rectangle

    @property
    def tensor(self) -> str:
        return self.matrix.stored.spec.name

    @property
    def source_bytes(self) -> int:
        """The number of source bytes in the block."""
        return self.matrix.run(self.part)[1]


class QuantizeBlock(_MatrixBlock):
    """Read a rectangle of a linear weight, write it in int8."""

    __slots__ = ()


class RewriteBlock(_MatrixBlock):
    """Read a rectangle of a tensor that is stored transposed or that changes, write it in the output's form."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """Copy `size_bytes` bytes of a tensor, from `start_bytes` of it on."""

    stored: StoredTensor
    start_bytes: int
    size_bytes: int

    @property
    def tensor(self) -> str:
        return self.stored.spec.name

    @property
    def source_bytes(self) -> int:
        """The number of source bytes in the block."""
        return self.size_bytes


Block = QuantizeBlock | RewriteBlock | CopyBlock


def blocks_of(
    contents: ShardContents, decisions: Mapping[str, Decision], smoothed: Collection[str] = ()
) -> Iterator[Block]:
    """Every block of a shard, in the order of the source file. `smoothed` tensors are multiplied by scales."""
    for stored in contents.tensors:
        decision, is_smoothed = decisions[stored.spec.name], stored.spec.name in smoothed
        if not stored.spec.numel:
            continue
        if decision.quantize:
            matrix = Matrix.of(stored, transpose=decision.transpose)
            yield from (QuantizeBlock(matrix, part) for part in matrix.rectangles())
        elif stored.column_major or stored.scaled or decision.written_dtype != stored.spec.dtype or is_smoothed:
            matrix = Matrix.of(stored, transpose=False) if stored.column_major else Matrix.flat(stored)
            yield from (RewriteBlock(matrix, part) for part in matrix.rectangles())
        else:
            for start in range(0, stored.spec.nbytes, COPY_BYTES):
                yield CopyBlock(stored, start, min(COPY_BYTES, stored.spec.nbytes - start))
