"""One shard: its blocks read, quantized or copied, and written, with every figure and digest in the same pass.

Owns the threads of a pass and the order of what they do. Knows nothing of other shards, of records or of the Hub.
"""

import struct
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from int8cli.checkpoint.digest import SourceDigest, new_digest
from int8cli.checkpoint.reader import ShardReader
from int8cli.checkpoint.tensor import DTYPE_BITS, ShardContents, TensorSpec
from int8cli.conversion.buffers import TORCH_DTYPE, CrosswiseTiles, WideRowAbsmax, Workbench
from int8cli.conversion.task import PassOptions
from int8cli.errors import NonFiniteError
from int8cli.llm_int8.metrics import ErrorSums
from int8cli.llm_int8.quantize import BlockQuantizer, NonFiniteWeightError, quantization_steps
from int8cli.planning.blocks import (
    BLOCK_ELEMENTS,
    Block,
    CopyBlock,
    Matrix,
    QuantizeBlock,
    Rectangle,
    RewriteBlock,
    blocks_of,
)
from int8cli.planning.output_files import OutputShard, outlier_cols_name, outlier_weight_name
from int8cli.planning.plan import Decision
from int8cli.workers.threads import TurnAbandonedError, Turnstile, run_in_threads

# For moving bytes around, a dtype's width is all that matters.
_DTYPE_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class NonFiniteValue:
    """A non-finite value in a tensor, with its position as the source stores it."""

    row: int
    column: int
    value: float

    def __str__(self) -> str:
        return f"{self.value} at row {self.row:,}, column {self.column:,}"


@dataclass(slots=True)
class PassResult:
    """What a pass saw: the errors, where they were asked for, and the digests of what it wrote, by tensor.

    `non_finite` names weights that must be kept; with any, the written file is not the result.
    """

    sums: dict[str, ErrorSums] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    non_finite: dict[str, NonFiniteValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Written:
    """What one block yields: bytes for the outputs by tensor, and what its turn adds to the digests and sums."""

    name: str
    outputs: tuple[tuple[str, int, memoryview], ...]  # tensor, offset in its bytes, bytes
    source: tuple[int, memoryview] | None = None  # offset in the file, bytes, where they are one run
    sums: ErrorSums | None = None
    non_finite: NonFiniteValue | None = None


class Sink(Protocol):
    """What a pass gives its bytes to: the writer of a file, or a comparison with one that stands."""

    def write_at(self, offset_bytes: int, data: memoryview | bytes) -> None:
        """Take bytes of the file; from any thread, in any order. `data` is the caller's, and reused."""


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The second file of a pass: the input columns to store exactly, by the tensor's name, each sorted."""

    output: OutputShard
    columns: Mapping[str, tuple[int, ...]]


class ShardPass:
    """One pass over a shard. Make it, `run` it once.

    `on_bytes(tensor name, source bytes done)` is called after each block, from one thread at a time, in file order.
    """

    def __init__(
        self,
        layout: ShardContents,
        decisions: Mapping[str, Decision],
        reader: ShardReader,
        output: OutputShard,
        options: PassOptions,
        sidecar: Sidecar | None = None,
    ) -> None:
        self._layout = layout
        self._decisions = decisions
        self._reader = reader
        self._output = output
        self._options = options
        self._sidecar = sidecar
        self._columns = dict(sidecar.columns) if sidecar is not None else {}
        self._result = PassResult()
        files = [output, sidecar.output] if sidecar is not None else [output]
        self._digests = {name: new_digest() for file in files for name in file.tensors}
        self._places: dict[str, tuple[Sink, int]] = {}
        self._turnstile = Turnstile()
        self._tickets = enumerate(blocks_of(layout, decisions))
        self._tickets_lock = threading.Lock()
        self._tiles = CrosswiseTiles(reader)
        self._wide_row = WideRowAbsmax()
        self._error: BaseException | None = None

    def run(
        self,
        sink: Sink,
        on_bytes: Callable[[str, int], None],
        source_digest: SourceDigest | None = None,
        sidecar_sink: Sink | None = None,
    ) -> PassResult:
        """Give `sink` the shard's header and tensors, and `sidecar_sink` those of the sidecar, where there is one.

        `source_digest` is given every run of the source's bytes as it passes. Raises NonFiniteError, CorruptShardError,
        OutputError.
        """
        self._open(self._output, sink)
        if self._sidecar is not None and sidecar_sink is not None:
            self._open(self._sidecar.output, sidecar_sink)
        run_in_threads(partial(self._work, on_bytes, source_digest), self._options.threads, self._stop)
        if self._error is not None:
            raise self._error
        self._write_constants()
        self._result.digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        return self._result

    def _open(self, output: OutputShard, sink: Sink) -> None:
        sink.write_at(0, output.header)
        self._places.update({name: (sink, place.offset_bytes) for name, place in output.tensors.items()})

    def _write(self, name: str, offset_bytes: int, data: memoryview | bytes) -> None:
        sink, start = self._places[name]
        sink.write_at(start + offset_bytes, data)

    def _work(self, on_bytes: Callable[[str, int], None], source_digest: SourceDigest | None) -> None:
        try:
            bench = self._workbench()
            with bench.in_stream():
                for ticket, block in self._claim():
                    written = self._process(bench, block)
                    with self._turnstile.turn(ticket):
                        self._take_down(written, source_digest)
                        on_bytes(written.name, _source_bytes(block))
                    for name, offset, data in written.outputs:
                        self._write(name, offset, data)
        except TurnAbandonedError:
            pass
        except BaseException as error:
            self._stop(error)

    def _workbench(self) -> Workbench:
        options = self._options
        quantizer = BlockQuantizer(BLOCK_ELEMENTS, device=options.device, float32_via_half=options.float32_via_half)
        return Workbench(self._reader, self._tiles, quantizer)

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

    def _process(self, bench: Workbench, block: Block) -> _Written:
        if isinstance(block, CopyBlock):
            return self._copy(bench, block)
        if isinstance(block, RewriteBlock):
            return self._rewrite(bench, block)
        return self._quantize(bench, block)

    def _copy(self, bench: Workbench, block: CopyBlock) -> _Written:
        name, offset = block.stored.spec.name, block.stored.offset_bytes + block.start_bytes
        data = bench.read(offset, block.size_bytes)
        return _Written(name, ((name, block.start_bytes, data),), source=(offset, data))

    def _rewrite(self, bench: Workbench, block: RewriteBlock) -> _Written:
        matrix, part = block.matrix, block.part
        spec, dtype_name = matrix.stored.spec, self._output.tensors[matrix.stored.spec.name].spec.dtype
        width_bytes = DTYPE_BITS[dtype_name] // 8
        if dtype_name == spec.dtype:
            bench.load_here(matrix, part, _DTYPE_OF_WIDTH[width_bytes])
            data = bench.source.bytes[: part.numel * width_bytes]
        else:
            loaded = bench.load_here(matrix, part, TORCH_DTYPE[spec.dtype])
            bench.scales.tensor(TORCH_DTYPE[dtype_name], (part.rows, part.columns)).copy_(loaded)
            data = bench.scales.bytes[: part.numel * width_bytes]
        start = (part.row * matrix.in_features + part.column) * width_bytes
        return _Written(spec.name, ((spec.name, start, data),), source=bench.source_run(matrix, part))

    def _quantize(self, bench: Workbench, block: QuantizeBlock) -> _Written:
        matrix, part = block.matrix, block.part
        spec = matrix.stored.spec
        if spec.name in self._result.non_finite:
            return _Written(spec.name, ())
        try:
            loaded = bench.load(matrix, part, TORCH_DTYPE[spec.dtype])
            absmax = self._row_absmax(bench, matrix, part, loaded)
        except NonFiniteWeightError as found:
            return _Written(spec.name, (), non_finite=self._place(matrix, part, found))
        data = bench.data.tensor(torch.int8, (part.rows, part.columns))
        scales = bench.scales.tensor(torch.float32, (part.rows,))
        sums = None
        if self._options.figures:
            sums = bench.quantizer.quantize_and_measure(loaded, absmax, data=data, stored_absmax=scales)
        else:
            bench.quantizer.quantize(loaded, absmax, data=data, stored_absmax=scales)
        if self._output.target.SCALES == "step":
            quantization_steps(scales)
        outputs = [(spec.name, part.row * matrix.in_features + part.column, bench.data.bytes[: part.numel])]
        if part.column == 0:
            scale_name = self._output.target.scale_name(spec.name)
            outputs.append((scale_name, part.row * 4, bench.scales.bytes[: part.rows * 4]))
        outputs += self._stored_columns(bench, spec.name, part, loaded)
        return _Written(spec.name, tuple(outputs), source=bench.source_run(matrix, part), sums=sums)

    def _stored_columns(
        self, bench: Workbench, weight: str, part: Rectangle, loaded: Tensor
    ) -> list[tuple[str, int, memoryview]]:
        """What of the columns to store exactly lies in a rectangle."""
        columns = self._columns.get(weight, ())
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
        absmax = self._wide_row.get(bench, matrix, part.row)
        bench.load(matrix, part, loaded.dtype)
        return absmax

    def _place(self, matrix: Matrix, part: Rectangle, found: NonFiniteWeightError) -> NonFiniteValue:
        row, column = part.row + found.row, found.column
        if self._decisions[matrix.stored.spec.name].transpose:
            row, column = column, row
        return NonFiniteValue(row, column, found.value)

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

    def _write_constants(self) -> None:
        """What does not come out of blocks: the layout's marks, and the indices of stored columns."""
        for decision in self._decisions.values():
            if decision.quantize:
                for name, mark in self._output.target.marks(decision.spec.name).items():
                    self._write_constant(name, mark)
                if self._sidecar is not None:
                    columns = self._columns.get(decision.spec.name, ())
                    self._write_constant(outlier_cols_name(decision.module), struct.pack(f"<{len(columns)}i", *columns))

    def _write_constant(self, name: str, data: bytes) -> None:
        self._write(name, 0, data)
        self._digests[name].update(data)


def _source_bytes(block: Block) -> int:
    if isinstance(block, CopyBlock):
        return block.size_bytes
    spec: TensorSpec = block.matrix.stored.spec
    return block.part.numel * (spec.nbytes // spec.numel)


def non_finite_error(file_name: str, tensor: str, place: NonFiniteValue) -> NonFiniteError:
    return NonFiniteError(
        f"{file_name}: {tensor} holds {place}",
        hint="The checkpoint is damaged there. Such tensors can be left in their source dtype.",
    )
