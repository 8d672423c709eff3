"""One block: from its bytes in the source to its bytes in the outputs.

Owns what happens to a block: it is copied, rewritten in another order or dtype, or quantized, the last two also scaled
by the scales of a smoothing. Does not know about files, threads, or the order of blocks.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from int8cli.checkpoint.reader import ShardReader
from int8cli.checkpoint.tensor import DTYPE_BITS
from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES
from int8cli.conversion.buffers import CrosswiseTiles, WideRowAbsmax, Workbench
from int8cli.conversion.scaling import BlockScaling
from int8cli.conversion.task import PassOptions
from int8cli.llm_int8.metrics import ErrorSums
from int8cli.llm_int8.quantize import BlockQuantizer, NonFiniteWeightError, quantization_steps
from int8cli.planning.blocks import BLOCK_ELEMENTS, Block, CopyBlock, Matrix, QuantizeBlock, Rectangle, RewriteBlock
from int8cli.planning.output_files import outlier_weight_name
from int8cli.planning.planned_shard import PlannedShard

# When bytes are only moved, a dtype's width is all that matters.
_DTYPE_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Piece = tuple[str, int, memoryview]  # name of an output tensor, offset in its bytes, the bytes


@dataclass(frozen=True, slots=True)
class NonFiniteValue:
    """A non-finite value, with its position in the tensor as stored in the source."""

    row: int
    column: int
    value: float

    def __str__(self) -> str:
        return f"{self.value} at row {self.row:,}, column {self.column:,}"


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """The result of one block of the tensor `name`. The bytes are in the buffers and valid until the next block.

    `source` is the offset of the block in the file and its bytes there, if they are contiguous.
    """

    name: str
    outputs: tuple[Piece, ...] = ()
    source: tuple[int, memoryview] | None = None
    sums: ErrorSums | None = None
    non_finite: NonFiniteValue | None = None


class BlockConverter:
    """Converts the blocks of one shard in any order. Each thread uses its own buffers."""

    def __init__(self, planned: PlannedShard, reader: ShardReader, options: PassOptions) -> None:
        self._planned = planned
        self._target = planned.target
        self._decisions = planned.decisions
        self._reader = reader
        self._options = options
        self._tiles = CrosswiseTiles(reader)
        self._wide_row = WideRowAbsmax()
        self._scaling = BlockScaling(planned.exponents, options.device)

    def workbench(self) -> Workbench:
        """The buffers for one thread."""
        options = self._options
        quantizer = BlockQuantizer(BLOCK_ELEMENTS, device=options.device, float32_via_half=options.float32_via_half)
        return Workbench(self._reader, self._planned.contents, self._tiles, quantizer)

    def convert(self, bench: Workbench, block: Block) -> BlockBytes:
        """Convert one block. Raises CorruptShardError or SourceError if the source cannot be read."""
        if isinstance(block, CopyBlock):
            return self._copy(bench, block)
        if isinstance(block, RewriteBlock):
            return self._rewrite(bench, block)
        return self._quantize(bench, block)

    def _copy(self, bench: Workbench, block: CopyBlock) -> BlockBytes:
        name, offset = block.stored.spec.name, block.stored.offset_bytes + block.start_bytes
        data = bench.read(offset, block.size_bytes)
        return BlockBytes(name, ((name, block.start_bytes, data),), source=(offset, data))

    def _rewrite(self, bench: Workbench, block: RewriteBlock) -> BlockBytes:
        matrix, part = block.matrix, block.part
        spec, dtype_name = matrix.stored.spec, self._planned.output.tensors[matrix.stored.spec.name].spec.dtype
        width_bytes = DTYPE_BITS[dtype_name] // 8
        if spec.name in self._planned.exponents:
            loaded = self._scaling.scaled_vector(spec.name, part, bench.load_floats_here(matrix, part))
            bench.scales.tensor(TORCH_DTYPES[dtype_name], (part.rows, part.columns)).copy_(loaded)
            data = bench.scales.bytes[: part.numel * width_bytes]
        elif dtype_name == matrix.stored.file_dtype:
            bench.load_here(matrix, part, _DTYPE_OF_WIDTH[width_bytes])
            data = bench.source.bytes[: part.numel * width_bytes]
        else:
            loaded = bench.load_floats_here(matrix, part)
            bench.scales.tensor(TORCH_DTYPES[dtype_name], (part.rows, part.columns)).copy_(loaded)
            data = bench.scales.bytes[: part.numel * width_bytes]
        start = (part.row * matrix.in_features + part.column) * width_bytes
        return BlockBytes(spec.name, ((spec.name, start, data),), source=bench.source_run(matrix, part))

    def _quantize(self, bench: Workbench, block: QuantizeBlock) -> BlockBytes:
        matrix, part = block.matrix, block.part
        spec = matrix.stored.spec
        try:
            loaded = self._load(bench, matrix, part)
            absmax = self._row_absmax(bench, matrix, part, loaded)
        except NonFiniteWeightError as found:
            return BlockBytes(spec.name, non_finite=self._place(matrix, part, found))
        sums = self._quantize_into_bench(bench, *self._as_loaders_cast(loaded, absmax))
        if self._target.PACKED:
            bench.data.tensor(torch.int8, (part.numel,)).bitwise_xor_(-128)
        outputs = [
            (
                self._target.data_name(spec.name),
                part.row * matrix.in_features + part.column,
                bench.data.bytes[: part.numel],
            )
        ]
        if part.column == 0:
            outputs.append((self._target.scale_name(spec.name), part.row * 4, bench.scales.bytes[: part.rows * 4]))
        outputs += self._stored_columns(bench, spec.name, part, loaded)
        return BlockBytes(spec.name, tuple(outputs), source=bench.source_run(matrix, part), sums=sums)

    def _as_loaders_cast(self, loaded: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
        """A block and the absmax of its rows in the model's dtype, where bitsandbytes would see them in that.

        transformers casts to the dtype of config.json before bitsandbytes casts to float16: of the three only bfloat16
        has fewer digits. Rounding keeps the order, so a row's absmax is rounded with it.
        """
        options, plan = self._options, self._planned.plan
        rounded = loaded.dtype == torch.float16 or (loaded.dtype == torch.float32 and options.float32_via_half)
        if not (rounded and plan.dtype == "BF16" and self._target.AS_ON_LOAD):
            return loaded, absmax
        return loaded.bfloat16(), absmax.bfloat16().float()

    def _quantize_into_bench(self, bench: Workbench, loaded: Tensor, absmax: Tensor) -> ErrorSums | None:
        """Fill the bench's `data` and `scales` from a rectangle (rows, columns) and its absmax (rows,)."""
        data = bench.data.tensor(torch.int8, (loaded.shape[0], loaded.shape[1]))
        scales = bench.scales.tensor(torch.float32, (loaded.shape[0],))
        sums = None
        if self._options.figures:
            sums = bench.quantizer.quantize_and_measure(loaded, absmax, data=data, stored_absmax=scales)
        else:
            bench.quantizer.quantize(loaded, absmax, data=data, stored_absmax=scales)
        if self._target.SCALES == "step":
            quantization_steps(scales)
        return sums

    def _stored_columns(self, bench: Workbench, weight: str, part: Rectangle, loaded: Tensor) -> list[Piece]:
        """The part of the stored columns that is in a rectangle."""
        columns = self._planned.columns.get(weight, ())
        first, end = (bisect_left(columns, edge) for edge in (part.column, part.column + part.columns))
        if first == end:
            return []
        chosen = torch.tensor([column - part.column for column in columns[first:end]], device=loaded.device)
        gathered = bench.gather(loaded, chosen)
        start = (part.row * len(columns) + first) * loaded.dtype.itemsize
        return [(outlier_weight_name(self._decisions[weight].module), start, gathered)]

    def _row_absmax(self, bench: Workbench, matrix: Matrix, part: Rectangle, loaded: Tensor) -> Tensor:
        if part.columns == matrix.in_features:
            return bench.quantizer.row_absmax(loaded)
        absmax = self._wide_row.get(bench, matrix, part.row, lambda piece: self._load(bench, matrix, piece))
        self._load(bench, matrix, part)
        return absmax

    def _load(self, bench: Workbench, matrix: Matrix, part: Rectangle) -> Tensor:
        """A rectangle of a weight, smoothed if the weight is. Overwrites the previous one."""
        loaded = bench.load(matrix, part)
        return self._scaling.scaled(bench, matrix, part, loaded)

    def _place(self, matrix: Matrix, part: Rectangle, found: NonFiniteWeightError) -> NonFiniteValue:
        row, column = part.row + found.row, found.column
        if self._decisions[matrix.stored.spec.name].transpose:
            row, column = column, row
        return NonFiniteValue(row, column, found.value)
