"""How a shard is cut into blocks, so that no tensor is ever held whole.

Owns the block size and the shape of a block. A block is a rectangle of one tensor as the output holds it; the cut
depends on the tensor alone, never on the number of threads, so that every run adds up the same sums in the same order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from int8cli.checkpoint.tensor import ShardContents, StoredTensor
from int8cli.planning.plan import Decision

# 512K elements: the buffers of one block (1 MB of 16-bit input, twice 2 MB of float32, 512 KB of int8) stay in the
# last-level cache, and a write of 512 KB is the largest that the page cache takes at full speed.
BLOCK_ELEMENTS = 1 << 19
COPY_BYTES = 1 << 19
# What is read at once of a tensor that lies crosswise; two such tiles are held.
TILE_BYTES = 1 << 24
# Over the blocks of one shard, at most. With more, they wait for each other: for Python's lock, and the file's.
THREADS_FOR_A_SHARD = 4
# What one thread holds, in bytes an element of a block: source 8 (the widest dtype), float32 scaled and rounded 4 + 4,
# int8 data 1, scales 4 (a block may be one column).
BUFFER_BYTES_A_THREAD = BLOCK_ELEMENTS * (8 + 4 + 4 + 1 + 4)


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
    """A 2-D tensor as the output wants it, and how its bytes lie in the source.

    `out_features` x `in_features`, row-major in the output. `crosswise`: the source's bytes are those of the transpose,
    as for a Conv1D weight, or a linear weight that a `.bin` stores transposed.
    """

    stored: StoredTensor
    out_features: int
    in_features: int
    crosswise: bool

    @classmethod
    def of(cls, stored: StoredTensor, *, transpose: bool) -> "Matrix":
        first, second = stored.spec.shape
        out_features, in_features = (second, first) if transpose else (first, second)
        return cls(stored, out_features, in_features, transpose != stored.column_major)

    @classmethod
    def flat(cls, stored: StoredTensor) -> "Matrix":
        """A row-major tensor of any shape as one row."""
        return cls(stored, 1, stored.spec.numel, False)

    def run(self, part: Rectangle) -> tuple[int, int]:
        """Offset and size in bytes of a rectangle that is one run in the file: whole rows, or part of a single one."""
        width_bytes = self.stored.spec.nbytes // self.stored.spec.numel
        start = part.row * self.in_features + part.column
        return self.stored.offset_bytes + start * width_bytes, part.numel * width_bytes

    def rectangles(self) -> Iterator[Rectangle]:
        """Whole rows, as many as fit a block; a row wider than a block is cut by columns."""
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
        """How many bytes of the source it covers."""
        return self.matrix.run(self.part)[1]


class QuantizeBlock(_MatrixBlock):
    """Read a rectangle of a linear weight, write it in int8."""

    __slots__ = ()


class RewriteBlock(_MatrixBlock):
    """Read a rectangle of a tensor that lies crosswise or changes its dtype, write it as the output has it."""

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
        """How many bytes of the source it covers."""
        return self.size_bytes


Block = QuantizeBlock | RewriteBlock | CopyBlock


def blocks_of(contents: ShardContents, decisions: Mapping[str, Decision]) -> Iterator[Block]:
    """Every block of a shard, in the order of the source file."""
    for stored in contents.tensors:
        decision = decisions[stored.spec.name]
        if not stored.spec.numel:
            continue
        if decision.quantize:
            matrix = Matrix.of(stored, transpose=decision.transpose)
            yield from (QuantizeBlock(matrix, part) for part in matrix.rectangles())
        elif stored.column_major or decision.written_dtype != stored.spec.dtype:
            matrix = Matrix.of(stored, transpose=False) if stored.column_major else Matrix.flat(stored)
            yield from (RewriteBlock(matrix, part) for part in matrix.rectangles())
        else:
            for start in range(0, stored.spec.nbytes, COPY_BYTES):
                yield CopyBlock(stored, start, min(COPY_BYTES, stored.spec.nbytes - start))
