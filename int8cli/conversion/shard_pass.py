"""One pass over a shard: several threads read, convert and write its blocks.

Owns these threads, the order of their work, and where the bytes of each output go. Does not know about other shards,
records or the Hub.
"""

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from int8cli.checkpoint.digest import SourceDigest
from int8cli.checkpoint.reader import ShardReader
from int8cli.conversion.block_bytes import BlockBytes, BlockConverter
from int8cli.conversion.pass_ledger import PassLedger, PassResult
from int8cli.conversion.task import PassOptions
from int8cli.planning.blocks import Block, blocks_of
from int8cli.planning.exponents import exponent_specs
from int8cli.planning.output_files import outlier_cols_name
from int8cli.planning.planned_shard import PlannedShard
from int8cli.workers.threads import TurnAbandonedError, Turnstile, run_in_threads


class Sink(Protocol):
    """Receives the bytes of a pass: the writer of a file, or a comparison with an existing file."""

    def write_at(self, offset_bytes: int, data: memoryview | bytes) -> None:
        """Receive bytes of the file, from any thread, in any order. The caller reuses `data` afterwards."""


class ShardPass:
    """One pass over a shard. Call `run` once.

    `sinks` receive the planned files, in their order. `on_bytes(tensor name, source bytes)` is called after each block,
    from one thread at a time, in file order.
    """

    def __init__(
        self,
        planned: PlannedShard,
        reader: ShardReader,
        options: PassOptions,
        sinks: Sequence[Sink],
        on_bytes: Callable[[str, int], None],
    ) -> None:
        self._planned = planned
        self._options = options
        self._sinks = sinks
        self._on_bytes = on_bytes
        self._converter = BlockConverter(planned, reader, options)
        self._places = {
            name: (sink, place.offset_bytes)
            for file, sink in zip(planned.files, sinks, strict=True)
            for name, place in file.tensors.items()
        }
        self._turnstile = Turnstile()
        self._tickets = enumerate(blocks_of(planned.contents, planned.decisions, planned.exponents))
        self._tickets_lock = threading.Lock()
        self._error: BaseException | None = None

    def run(self, source_digest: SourceDigest | None = None) -> PassResult:
        """Give all headers and tensors to the sinks.

        `source_digest`, if any, receives the bytes of the source. Raises NonFiniteError, CorruptShardError,
        OutputError.
        """
        keep = self._options.keep_non_finite
        ledger = PassLedger(self._planned, keep_non_finite=keep, source_digest=source_digest)
        for file, sink in zip(self._planned.files, self._sinks, strict=True):
            sink.write_at(0, file.header)
        run_in_threads(partial(self._work, ledger), self._options.threads, self._stop)
        if self._error is not None:
            raise self._error
        for name, data in _constants(self._planned):
            self._write(name, 0, data)
            ledger.add_constant(name, data)
        return ledger.result()

    def _work(self, ledger: PassLedger) -> None:
        """The work of one thread: claim blocks in file order, and add each to the ledger in its turn."""
        try:
            bench = self._converter.workbench()
            with bench.in_stream():
                for ticket, block in self._claim():
                    if ledger.is_non_finite(block.tensor):  # there will be a second pass with another plan
                        converted = BlockBytes(block.tensor)
                    else:
                        converted = self._converter.convert(bench, block)
                    with self._turnstile.turn(ticket):
                        ledger.add(converted)
                        self._on_bytes(block.tensor, block.source_bytes)
                    for name, offset, data in converted.outputs:
                        self._write(name, offset, data)
        except TurnAbandonedError:
            pass
        except BaseException as error:
            self._stop(error)

    def _claim(self) -> Iterator[tuple[int, Block]]:
        """The blocks for this thread. All threads together take them in file order."""
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

    def _write(self, name: str, offset_bytes: int, data: memoryview | bytes) -> None:
        sink, start = self._places[name]
        sink.write_at(start + offset_bytes, data)


def _constants(planned: PlannedShard) -> Iterator[tuple[str, bytes]]:
    """The tensors that no block produces: the layout's marks, the indices of stored columns, and exponents."""
    for decision in planned.plan.quantized:
        yield from planned.target.marks(decision.spec.name, decision.computed_shape).items()
        if planned.sidecar is not None:
            columns = planned.columns.get(decision.spec.name, ())
            yield outlier_cols_name(decision.module), struct.pack(f"<{len(columns)}i", *columns)
    if planned.sidecar is not None:
        for name, exponents in planned.exponents.items():
            yield from ((spec.name, data) for spec, data in exponent_specs(name, exponents))
