"""All shards of a conversion. Each is fetched, converted and recorded, and only then released.

Owns the order of these steps, and which shards are converted at the same time. Does not know how columns are chosen or
where tasks run.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from heapq import nlargest

from int8cli.checkpoint.source import LocalFile, Source
from int8cli.conversion.announce import TASK, advance, shard_outcome
from int8cli.conversion.column_source import ColumnSource, RequireRoom
from int8cli.conversion.resumed_smoothing import require_same
from int8cli.conversion.task import ShardTask
from int8cli.errors import DigestMismatchError, WorkerLostError
from int8cli.planning.blocks import THREADS_FOR_A_SHARD
from int8cli.planning.exponents import NOTHING_SCALED, TensorExponents
from int8cli.progress import Progress
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore
from int8cli.workers.processes import Executor, OnBytes, Result


def ignore(record: ShardRecord) -> None:
    """What is told of finished shards where they stay."""


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A shard that is being converted. Once it is recorded, `fetched` is exited, which removes a fetched copy."""

    task: ShardTask
    fetched: ExitStack


class ShardLoop:
    """Converts shards: first those that the source of columns fetches itself, then the others, several at a time.

    While shards are converted, the next one is fetched. A shard with a wrong digest is fetched once more. `on_record`
    hears of each shard once it is recorded and its fetched copy is gone.
    """

    def __init__(
        self,
        source: Source,
        tasks: Sequence[ShardTask],
        executor: Executor,
        store: RecordStore,
        progress: Progress,
        columns: ColumnSource,
        recorded: Mapping[str, TensorExponents] = NOTHING_SCALED,
        on_record: Callable[[ShardRecord], None] = ignore,
    ) -> None:
        """`recorded` are the exponents of all tensors in shards that an earlier run finished."""
        self._source, self._executor, self._store, self._progress = source, executor, store, progress
        self._columns, self._recorded, self._on_record = columns, recorded, on_record
        self._waiting = {task.source.file: task for task in tasks}
        self._under_way: dict[Future[ShardRecord], _UnderWay] = {}
        self._fetched_again: set[str] = set()
        self._records: dict[str, ShardRecord] = {}

    def run(self, require_room: RequireRoom) -> dict[str, ShardRecord]:
        """The records by source file.

        After an error, work in progress is stopped, and its files do not get their final names. Fetched copies of
        shards without a record remain for the next run.
        """
        try:
            self._convert_as_read(require_room)
            self._convert_fetched()
        except BaseException as error:
            self._stop(error)
            if isinstance(error, BrokenExecutor):
                raise WorkerLostError(
                    "a worker process ended before its shard was finished",
                    hint="It probably ran out of memory or open files: run the same command with fewer processes.",
                ) from error
            raise
        return self._records

    def _convert_as_read(self, require_room: RequireRoom) -> None:
        """Convert, in this process, each shard that the source of columns yields, while its file exists."""
        if not self._waiting:
            return
        with closing(self._columns.shards(require_room)) as shards:
            for shard in shards:
                task = self._waiting.pop(shard.name, None)
                if task is not None:
                    task = self._prepared(task, shard.local, share=1.0)
                    record = _convert_shard(task, shard.local, partial(advance, self._progress))
                    self._record(record)
                    self._on_record(record)

    def _convert_fetched(self) -> None:
        """Convert the remaining shards, one in each slot of the executor."""
        while self._waiting or self._under_way:
            while self._waiting and len(self._under_way) < self._executor.slots:
                self._start(self._waiting.pop(next(iter(self._waiting))))
            for future in wait(self._under_way, return_when=FIRST_COMPLETED).done:
                self._finish(future)

    def _start(self, task: ShardTask) -> None:
        with ExitStack() as fetched:
            local = fetched.enter_context(self._source.fetch(task.source.file))
            if self._waiting:
                self._source.prefetch(next(iter(self._waiting)))
            share = task.tensor_bytes / max(1, self._bytes_beside() + task.tensor_bytes)
            future = self._executor.submit(partial(_convert_shard, self._prepared(task, local, share), local))
            self._under_way[future] = _UnderWay(task, fetched.pop_all())

    def _finish(self, future: Future[ShardRecord]) -> None:
        shard = self._under_way.pop(future)
        file = shard.task.source.file
        try:
            with shard.fetched:
                record = future.result()
                self._record(record)
        except DigestMismatchError:
            if not self._source.identity.on_hub or file in self._fetched_again:
                raise
            self._fetch_again(shard.task)
        else:
            self._on_record(record)

    def _fetch_again(self, task: ShardTask) -> None:
        """Fetch a shard again and start it at once, because its columns also affect the shards after it."""
        self._fetched_again.add(task.source.file)
        self._source.discard(task.source.file)
        self._progress.note(f"{task.source.file}: differs from what the Hub published; downloading it again")
        self._progress.advance(TASK, task.source.file, -task.tensor_bytes)
        self._start(task)

    def _prepared(self, task: ShardTask, local: LocalFile, share: float) -> ShardTask:
        """The task of a shard on this machine, with its columns and its share of all threads.

        A large shard among small ones gets more threads than an average process.
        """
        self._progress.advance(TASK, task.source.file, 0)
        stored = self._columns.columns_of(task.source.file, local, self._run_task)
        require_same(self._columns.settled(), self._recorded)
        task = task.with_borrowed(self._source).storing(stored, self._columns.smoothing_of(task.source.file))
        threads = round(task.options.threads * self._executor.slots * share)
        threads = min(max(1, threads), max(THREADS_FOR_A_SHARD, task.options.threads))
        return replace(task, options=replace(task.options, threads=threads))

    def _bytes_beside(self) -> int:
        """The most bytes that may be converted at the same time as the next shard: the largest others, one per slot."""
        others = [*(shard.task for shard in self._under_way.values()), *self._waiting.values()]
        return sum(nlargest(self._executor.slots - 1, (task.tensor_bytes for task in others)))

    def _run_task(self, task: Callable[[OnBytes], Result]) -> Result:
        """Run a task in a slot. One is free, because this is called for a shard that is about to be started."""
        return self._executor.submit(task).result()

    def _record(self, record: ShardRecord) -> None:
        self._store.add(record)
        self._records[record.source.file] = record
        self._progress.done(TASK, record.source.file, shard_outcome(record))

    def _stop(self, error: BaseException) -> None:
        self._executor.close()
        for shard in self._under_way.values():
            shard.fetched.__exit__(type(error), error, error.__traceback__)


def _convert_shard(task: ShardTask, local: LocalFile, on_bytes: OnBytes) -> ShardRecord:
    """Convert a shard in the current process. Only that process imports torch."""
    from int8cli.conversion.shard import convert_shard

    return convert_shard(task, local, on_bytes)
