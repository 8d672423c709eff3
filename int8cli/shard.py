"""One shard: its blocks read, quantized or copied, and written, with every figure and digest in the same pass.

Owns the threads of a pass and the buffers they work in. Knows nothing of other shards, of records or of the Hub.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from int8cli.blocks import BLOCK_ELEMENTS, Block, CopyBlock, Matrix, QuantizeBlock, Rectangle, TransposeBlock, blocks_of
from int8cli.checkpoint.reader import ShardReader
from int8cli.checkpoint.tensor import ShardLayout, StoredTensor, TensorSpec
from int8cli.digest import SourceDigest, TurnAbandonedError, Turnstile, new_digest
from int8cli.errors import NonFiniteError
from int8cli.llm_int8.metrics import ErrorSums
from int8cli.llm_int8.quantize import BlockQuantizer, NonFiniteWeightError, quantization_steps
from int8cli.output import OutputShard
from int8cli.plan import Decision

TORCH_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# For moving bytes around, a dtype's width is all that matters.
_DTYPE_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class PassOptions:
    """How a pass over a shard is made; nothing here changes the bytes it writes, but `float32_via_half`.

    `keep_non_finite`: a weight with NaN or an infinity is put down in the result instead of raised.
    """

    threads: int = 1
    device: str = "cpu"
    float32_via_half: bool = False
    keep_non_finite: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """A non-finite value in a tensor, with its position as the source stores it."""

    row: int
    column: int
    value: float


@dataclass(slots=True)
class PassResult:
    """What a pass saw. `non_finite` names weights that must be kept; with any, the written file is not the result."""

    sums: dict[str, ErrorSums] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    non_finite: dict[str, Place] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Written:
    """What one block yields: bytes for the output by tensor, and what its turn adds to the digests and sums."""

    name: str
    outputs: tuple[tuple[str, int, memoryview], ...]  # tensor, offset in its bytes, bytes
    source: tuple[int, memoryview] | None = None  # offset in the file, bytes, where they are one run
    sums: ErrorSums | None = None
    non_finite: Place | None = None


class Sink(Protocol):
    """What a pass gives its bytes to: the writer of a file, or a comparison with one that stands."""

    def write_at(self, offset_bytes: int, data: memoryview | bytes) -> None:
        """Take bytes of the file; from any thread, in any order. `data` is the caller's, and reused."""


class ShardPass:
    """One pass over a shard. Make it, `run` it once.

    `on_bytes(tensor name, source bytes done)` is called after each block, from one thread at a time, in file order.
    """

    def __init__(
        self,
        layout: ShardLayout,
        decisions: Mapping[str, Decision],
        reader: ShardReader,
        output: OutputShard,
        options: PassOptions,
    ) -> None:
        self._layout = layout
        self._decisions = decisions
        self._reader = reader
        self._output = output
        self._options = options
        self._result = PassResult()
        self._digests = {name: new_digest() for name in output.tensors}
        self._turnstile = Turnstile()
        self._tickets = enumerate(blocks_of(layout, decisions))
        self._tickets_lock = threading.Lock()
        self._wide_row = WideRowAbsmax()
        self._error: BaseException | None = None

    def run(
        self, sink: Sink, on_bytes: Callable[[str, int], None], source_digest: SourceDigest | None = None
    ) -> PassResult:
        """Give `sink` the shard's header and tensors. Raises NonFiniteError, CorruptShardError, OutputError.

        `source_digest` is given every run of the source's bytes as it passes.
        """
        sink.write_at(0, self._output.header)
        work = (sink, on_bytes, source_digest)
        threads = [threading.Thread(target=self._work, args=work, daemon=True) for _ in range(self._options.threads)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as interruption:
            self._stop(interruption)
            for thread in threads:
                thread.join()
            raise
        if self._error is not None:
            raise self._error
        self._write_marks(sink)
        self._result.digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        return self._result

    def _work(
        self, sink: Sink, on_bytes: Callable[[str, int], None], source_digest: SourceDigest | None
    ) -> None:
        try:
            bench = Workbench(self._options)
            for ticket, block in self._claim():
                written = self._process(bench, block)
                with self._turnstile.turn(ticket):
                    self._take_down(written, source_digest)
                    on_bytes(written.name, _source_bytes(block))
                for name, offset, data in written.outputs:
                    sink.write_at(self._output.tensors[name].offset_bytes + offset, data)
        except TurnAbandonedError:
            pass
        except BaseException as error:
            self._stop(error)

    def _claim(self) -> Iterator[tuple[int, Block]]:
        """The blocks, shared out among the threads in file order."""
        while True:
            with self._tickets_lock:
                ticket = next(self._tickets, None)
            if ticket is None:
                return
            yield ticket

    def _stop(self, error: BaseException) -> None:
        with self._tickets_lock:
            self._error = self._error or error
            self._tickets = enumerate(())
        self._turnstile.close()

    def _process(self, bench: "Workbench", block: Block) -> _Written:
        if isinstance(block, CopyBlock):
            return self._copy(bench, block)
        if isinstance(block, TransposeBlock):
            return self._transpose(bench, block)
        return self._quantize(bench, block)

    def _copy(self, bench: "Workbench", block: CopyBlock) -> _Written:
        name, offset = block.stored.spec.name, block.stored.offset_bytes + block.start_bytes
        data = bench.source.bytes[: block.size_bytes]
        self._reader.read_into(offset, data)
        return _Written(name, ((name, block.start_bytes, data),), source=(offset, data))

    def _transpose(self, bench: "Workbench", block: TransposeBlock) -> _Written:
        matrix, part = block.matrix, block.part
        spec = matrix.stored.spec
        width = spec.nbytes // spec.numel
        bench.load(self._reader, matrix, part, _DTYPE_OF_WIDTH[width])
        start = (part.row * matrix.in_features + part.column) * width
        return _Written(spec.name, ((spec.name, start, bench.source.bytes[: part.numel * width]),))

    def _quantize(self, bench: "Workbench", block: QuantizeBlock) -> _Written:
        matrix, part = block.matrix, block.part
        spec = matrix.stored.spec
        if spec.name in self._result.non_finite:
            return _Written(spec.name, ())
        try:
            loaded = bench.load(self._reader, matrix, part, TORCH_DTYPE[spec.dtype])
            absmax = self._row_absmax(bench, matrix, part, loaded)
        except NonFiniteWeightError as found:
            return _Written(spec.name, (), non_finite=self._place(matrix, part, found))
        data = bench.data.tensor(torch.int8, (part.rows, part.columns))
        scales = bench.scales.tensor(torch.float32, (part.rows,))
        sums = bench.quantizer.quantize(loaded, absmax, data=data, stored_absmax=scales)
        if self._output.target.SCALES == "step":
            quantization_steps(scales)
        outputs = [(spec.name, part.row * matrix.in_features + part.column, bench.data.bytes[: part.numel])]
        if part.column == 0:
            scale_name = self._output.target.scale_name(spec.name)
            outputs.append((scale_name, part.row * 4, bench.scales.bytes[: part.rows * 4]))
        return _Written(spec.name, tuple(outputs), source=bench.source_run(matrix, part), sums=sums)

    def _row_absmax(self, bench: "Workbench", matrix: Matrix, part: Rectangle, loaded: Tensor) -> Tensor:
        if part.columns == matrix.in_features:
            return bench.quantizer.row_absmax(loaded)
        absmax = self._wide_row.get(bench, self._reader, matrix, part.row)
        bench.load(self._reader, matrix, part, loaded.dtype)
        return absmax

    def _place(self, matrix: Matrix, part: Rectangle, found: NonFiniteWeightError) -> Place:
        row, column = part.row + found.row, found.column
        if self._decisions[matrix.stored.spec.name].transpose:
            row, column = column, row
        return Place(row, column, found.value)

    def _take_down(self, written: _Written, source_digest: SourceDigest | None) -> None:
        """What must happen in file order: digests, sums, and the first non-finite value of a tensor."""
        result = self._result
        if written.non_finite is not None:
            if not self._options.keep_non_finite:
                raise non_finite_error(self._layout.file_name, written.name, written.non_finite)
            result.non_finite.setdefault(written.name, written.non_finite)
        if written.sums is not None:
            result.sums[written.name] = result.sums.get(written.name, ErrorSums()) + written.sums
        for name, _, data in written.outputs:
            self._digests[name].update(data)
        if source_digest is not None and written.source is not None:
            source_digest.update(*written.source)

    def _write_marks(self, sink: Sink) -> None:
        for decision in self._decisions.values():
            if not decision.quantize:
                continue
            for name, mark in self._output.target.marks(decision.spec.name).items():
                sink.write_at(self._output.tensors[name].offset_bytes, mark)
                self._digests[name].update(mark)


class Buffer:
    """Memory seen both as bytes, for the disk, and as tensors, for the arithmetic. Allocated once."""

    def __init__(self, size_bytes: int) -> None:
        memory = bytearray(size_bytes)
        self.bytes = memoryview(memory)
        self._tensor = torch.frombuffer(memory, dtype=torch.uint8)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The first bytes of the buffer as a contiguous tensor of this dtype and shape."""
        numel = 1
        for size in shape:
            numel *= size
        return self._tensor[: numel * dtype.itemsize].view(dtype).view(shape)


class Workbench:
    """The buffers of one thread: source block, a second one to turn blocks that lie crosswise, int8 data, scales."""

    def __init__(self, options: PassOptions) -> None:
        self.source = Buffer(BLOCK_ELEMENTS * 8)
        self.data = Buffer(BLOCK_ELEMENTS)
        self.scales = Buffer(BLOCK_ELEMENTS * 4)
        self.quantizer = BlockQuantizer(
            BLOCK_ELEMENTS, device=options.device, float32_via_half=options.float32_via_half
        )
        self._crosswise: Buffer | None = None

    def load(self, reader: ShardReader, matrix: Matrix, part: Rectangle, dtype: torch.dtype) -> Tensor:
        """Read a rectangle; returns it (rows, columns), contiguous, on the quantizer's device."""
        loaded = self.source.tensor(dtype, (part.rows, part.columns))
        if matrix.crosswise:
            loaded.copy_(self._load_crosswise(reader, matrix, part, dtype).t())
        else:
            offset, run = _run(matrix, part, dtype.itemsize)
            reader.read_into(offset, self.source.bytes[:run])
        return loaded.to(self.quantizer.device, non_blocking=True)

    def source_run(self, matrix: Matrix, part: Rectangle) -> tuple[int, memoryview] | None:
        """Where the rectangle last loaded lies in the file, and its bytes, if they are one run there."""
        if matrix.crosswise:
            return None
        spec = matrix.stored.spec
        offset, run = _run(matrix, part, spec.nbytes // spec.numel)
        return offset, self.source.bytes[:run]

    def _load_crosswise(self, reader: ShardReader, matrix: Matrix, part: Rectangle, dtype: torch.dtype) -> Tensor:
        """Read the (columns, rows) rectangle of the source whose transpose is wanted, a run for each of its rows."""
        if self._crosswise is None:
            self._crosswise = Buffer(BLOCK_ELEMENTS * 8)
        run = part.rows * dtype.itemsize
        for index in range(part.columns):
            element = (part.column + index) * matrix.out_features + part.row
            target = self._crosswise.bytes[index * run : (index + 1) * run]
            reader.read_into(matrix.stored.offset_bytes + element * dtype.itemsize, target)
        return self._crosswise.tensor(dtype, (part.columns, part.rows))


class WideRowAbsmax:
    """The absmax of the row that is being worked on, where a row is wider than a block: found in one scan, kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._row: tuple[StoredTensor, int] | None = None
        self._absmax: Tensor | None = None

    def get(self, bench: Workbench, reader: ShardReader, matrix: Matrix, row: int) -> Tensor:
        """float32 (1,). Overwrites the bench's source buffer. Raises NonFiniteWeightError with the row's own column."""
        with self._lock:
            if self._absmax is None or self._row != (matrix.stored, row):
                self._absmax = _scan(bench, reader, matrix, row)
                self._row = (matrix.stored, row)
            return self._absmax


def _scan(bench: Workbench, reader: ShardReader, matrix: Matrix, row: int) -> Tensor:
    dtype = TORCH_DTYPE[matrix.stored.spec.dtype]
    pieces = []
    for piece in matrix.row_pieces(row):
        try:
            pieces.append(bench.quantizer.row_absmax(bench.load(reader, matrix, piece, dtype)))
        except NonFiniteWeightError as found:
            raise NonFiniteWeightError(0, piece.column + found.column, found.value) from None
    return torch.stack(pieces).amax(dim=0)


def _run(matrix: Matrix, part: Rectangle, width_bytes: int) -> tuple[int, int]:
    """Offset and size of a rectangle that is one run of bytes: whole rows, or part of a single one."""
    start = (part.row * matrix.in_features + part.column) * width_bytes
    return matrix.stored.offset_bytes + start, part.numel * width_bytes


def _source_bytes(block: Block) -> int:
    if isinstance(block, CopyBlock):
        return block.size_bytes
    spec: TensorSpec = block.matrix.stored.spec
    return block.part.numel * (spec.nbytes // spec.numel)


def non_finite_error(file_name: str, tensor: str, place: Place) -> NonFiniteError:
    return NonFiniteError(
        f"{file_name}: {tensor} holds {place.value} at row {place.row:,}, column {place.column:,}",
        hint="The checkpoint is damaged there. --on-nonfinite keep leaves such tensors in their source dtype.",
    )
