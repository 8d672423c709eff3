"""Converting a checkpoint: all of its shards, and what speaks of the whole.

Owns the order of the work and what makes it resumable: a shard that stands under its name is recorded, and only then is
its source let go. Prints nothing; a Progress is told.
"""

import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from heapq import nlargest
from pathlib import Path
from typing import Literal

from int8cli.checkpoint.lock import locked
from int8cli.checkpoint.source import LocalFile, Source
from int8cli.checkpoint.writer import copy_file
from int8cli.conversion import WORKER_PRELOAD
from int8cli.conversion.announce import TASK, begin_conversion, shard_outcome
from int8cli.conversion.column_source import ColumnSource, NoColumns
from int8cli.conversion.finish import RenderCard, write_conclusion
from int8cli.conversion.task import PassOptions, ShardTask
from int8cli.errors import (
    CANNOT_CALIBRATE,
    CorruptShardError,
    DigestMismatchError,
    DiskSpaceError,
    NothingToQuantizeError,
    WorkerLostError,
)
from int8cli.planning.blocks import THREADS_FOR_A_SHARD
from int8cli.planning.output_files import CARD_FILE, INDEX_FILE, REPORT_FILE
from int8cli.planning.survey import CONFIG_FILE, Survey, fingerprint, room_needed
from int8cli.progress import Progress
from int8cli.records.manifest import MANIFEST_FILE
from int8cli.records.store import VIA_FLOAT16, Conversion, RecordStore, Settings, ShardRecord, ShardSource
from int8cli.results.conversion import ConversionReport
from int8cli.workers.processes import Executor, InlineExecutor, OnBytes, ProcessExecutor, Result


@dataclass(frozen=True, slots=True)
class ConversionRun:
    """How to convert, besides the settings that decide the result.

    `workers` processes convert side by side, each with `threads` threads. `overwrite` starts anew in a directory that
    holds an earlier conversion.
    """

    output: Path
    on_nonfinite: Literal["error", "keep"] = "error"
    overwrite: bool = False
    workers: int = 1
    threads: int = 2
    device: str = "cpu"


def convert(
    source: Source,
    survey: Survey,
    settings: Settings,
    options: ConversionRun,
    render_card: RenderCard,
    progress: Progress,
    columns: ColumnSource | None = None,
) -> ConversionReport:
    """Convert what `survey` found in `source` into `options.output`, going on where an earlier run stopped.

    `columns` tells what to store in sidecars, where the survey has any. `render_card` makes the output's README.md
    from the report. Raises Int8cliError; whatever is raised, no file stands half-written under a final name, and the
    same call goes on from there.
    """
    if settings.only and not survey.plan.quantized:
        raise NothingToQuantizeError(
            "the patterns leave nothing to quantize", hint="The plan lists the modules, and why each is left alone."
        )
    store = RecordStore(options.output)
    with locked(options.output, store.own) as lock:
        if options.overwrite:
            store.clear()
        conversion = describe(source, survey, settings)
        store.check(conversion)
        records = {shard.file: record for shard in conversion.shards if (record := store.finished(shard))}
        remaining = [shard for shard in conversion.shards if shard.file not in records]
        _require_room(source, survey, options.output, remaining)
        store.claim(conversion)
        shutil.rmtree(store.partial_directory, ignore_errors=True)
        begin_conversion(progress, survey, records)
        for file_name in survey.weights.copied:
            _copy_file(source, file_name, options.output)
        if source.keeps_in is not None:
            _keep_what_leads_to_the_weights(source, survey)
        executor = _executor(options, len(remaining), lock, progress)
        try:
            tasks = [_task(shard, survey, settings, options, store) for shard in remaining]
            loop = _ShardLoop(source, tasks, executor, store, progress, columns or NoColumns())
            records.update(loop.run(partial(_require_room, source, survey, options.output)))
        except CANNOT_CALIBRATE:
            if not any(map(store.finished, conversion.shards)):  # the directory is free for another way to do it
                store.clear()
            raise
        finally:
            executor.close()
            shutil.rmtree(store.partial_directory, ignore_errors=True)  # an interrupt may have come before any clean-up
        progress.done(TASK)
        in_order = [records[shard.file] for shard in conversion.shards]
        report = write_conclusion(survey, conversion, in_order, options.output, render_card)
        # What a killed run fetched and a later one had no use for would otherwise stay for good.
        for directory in (store.incoming_directory, store.calibration_directory):
            shutil.rmtree(directory, ignore_errors=True)
        return report


def describe(source: Source, survey: Survey, settings: Settings) -> Conversion:
    """The conversion as the records hold it: what decides its bytes, and every file that it will write."""
    shards = tuple(
        ShardSource(
            layout.file_name,
            layout.file_bytes,
            fingerprint(source, layout.file_name),
            survey.outputs[layout.file_name].file_name,
        )
        for layout in survey.layouts
    )
    files = [shard.output for shard in shards]
    files += [sidecar.file_name for sidecar in survey.sidecars.values()]
    files += [*survey.weights.copied, CARD_FILE, REPORT_FILE]
    files += [CONFIG_FILE] if survey.has_config else []
    files += [INDEX_FILE] if len(shards) > 1 else []
    files += [MANIFEST_FILE]
    return Conversion(survey.identity, settings, survey.plan_digest, shards, tuple(files))


class _ShardLoop:
    """Brings shards here one after the other, hands them to the executor, and records each when it is done.

    While shards are worked on, the next is fetched. One whose copy is not what the Hub published is fetched once more.
    """

    def __init__(
        self,
        source: Source,
        tasks: list[ShardTask],
        executor: Executor,
        store: RecordStore,
        progress: Progress,
        columns: ColumnSource,
    ) -> None:
        self._source, self._executor, self._store, self._progress = source, executor, store, progress
        self._columns = columns
        self._waiting = deque(tasks)
        self._under_way: dict[Future[ShardRecord], tuple[ShardTask, ExitStack]] = {}
        self._fetched_again: set[str] = set()
        self._records: dict[str, ShardRecord] = {}

    def run(self, require_room: Callable[[list[ShardSource], int], None]) -> dict[str, ShardRecord]:
        """The records by source file. On an error, what is under way is stopped, and nothing of it has a name.

        `require_room(shards, bytes)` is asked first where the columns to store bring so many bytes of shards here.
        """
        try:
            if self._waiting:
                remaining = [task.source for task in self._waiting]
                self._columns.bring(self._convert_here, partial(require_room, remaining))
            while self._waiting or self._under_way:
                while self._waiting and len(self._under_way) < self._executor.slots:
                    self._start(self._waiting.popleft())
                for future in wait(self._under_way, return_when=FIRST_COMPLETED).done:
                    self._finish(future)
        except BaseException as error:
            self._executor.close()
            for _, held in self._under_way.values():
                held.__exit__(type(error), error, error.__traceback__)
            if isinstance(error, BrokenExecutor):
                raise WorkerLostError(
                    "a worker process ended before its shard was done",
                    hint="It probably ran out of memory: run the same command again with fewer processes.",
                ) from error
            raise
        return self._records

    def _convert_here(self, shard: str, local: LocalFile) -> None:
        """Convert a shard that somebody else has brought here, unless that is done."""
        task = next((task for task in self._waiting if task.source.file == shard), None)
        if task is None:
            return
        self._waiting.remove(task)
        self._progress.advance(TASK, shard, 0)
        stored = self._columns.columns_of(shard, local, self._run_task)
        task = self._with_threads(replace(task, stored=stored), 1.0)
        record = _convert_shard(task, local, partial(_advance, self._progress))
        self._store.add(record)
        self._records[shard] = record
        self._progress.done(TASK, shard, shard_outcome(record))

    def _start(self, task: ShardTask) -> None:
        held = ExitStack()
        local = held.enter_context(self._source.fetch(task.source.file))
        if self._waiting:
            self._source.prefetch(self._waiting[0].source.file)
        self._progress.advance(TASK, task.source.file, 0)
        task = replace(task, stored=self._columns.columns_of(task.source.file, local, self._run_task))
        task = self._with_threads(task, task.tensor_bytes / max(1, self._bytes_beside() + task.tensor_bytes))
        self._under_way[self._executor.submit(partial(_convert_shard, task, local))] = (task, held)

    def _bytes_beside(self) -> int:
        """What may be worked on beside a shard that is about to be started: the largest of all others, a slot each."""
        others = [*(task for task, _ in self._under_way.values()), *self._waiting]
        return sum(nlargest(self._executor.slots - 1, (task.tensor_bytes for task in others)))

    def _with_threads(self, task: ShardTask, share: float) -> ShardTask:
        """The task with its share of all threads, so that one large shard among small ones does not have one alone."""
        threads = round(task.options.threads * self._executor.slots * share)
        options = replace(task.options, threads=min(max(1, threads), max(THREADS_FOR_A_SHARD, task.options.threads)))
        return replace(task, options=options)

    def _run_task(self, task: Callable[[OnBytes], Result]) -> Result:
        """A free slot is there: this is called for a shard that is to be given to it next."""
        return self._executor.submit(task).result()

    def _finish(self, future: Future[ShardRecord]) -> None:
        task, held = self._under_way.pop(future)
        try:
            with held:  # a fetched copy goes once its record is there
                record = future.result()
                self._store.add(record)
        except DigestMismatchError:
            if not self._source.identity.on_hub or task.source.file in self._fetched_again:
                raise
            self._fetch_again(task)
            return
        self._records[task.source.file] = record
        self._progress.done(TASK, task.source.file, shard_outcome(record))

    def _fetch_again(self, task: ShardTask) -> None:
        self._fetched_again.add(task.source.file)
        self._source.discard(task.source.file)
        self._progress.note(f"{task.source.file}: not what the Hub published; fetching it once more")
        self._progress.advance(TASK, task.source.file, -task.tensor_bytes)
        self._waiting.appendleft(task)  # what it tells of the columns to store is for the shards after it


def _convert_shard(task: ShardTask, local: LocalFile, on_bytes: OnBytes) -> ShardRecord:
    """Convert a shard in the process that this is called in: torch comes with it, and this one may do without."""
    from int8cli.conversion.shard import convert_shard

    return convert_shard(task, local, on_bytes)


def _task(
    shard: ShardSource, survey: Survey, settings: Settings, options: ConversionRun, store: RecordStore
) -> ShardTask:
    layout = next(layout for layout in survey.layouts if layout.file_name == shard.file)
    own = tuple(survey.decisions[stored.spec.name] for stored in layout.tensors)
    via_half = settings.float32 == VIA_FLOAT16
    return ShardTask(
        source=shard,
        weight_format=survey.weights.format,
        layout=layout,
        plan=replace(survey.plan, decisions=own),
        output=options.output / shard.output,
        partial=store.partial_directory / shard.output,
        options=PassOptions(
            options.threads, options.device, via_half, options.on_nonfinite == "keep", settings.figures
        ),
        target=settings.layout,
        sidecar=options.output / sidecar.file_name if (sidecar := survey.sidecars.get(shard.file)) else None,
    )


def _executor(options: ConversionRun, shards: int, lock: int, progress: Progress) -> Executor:
    on_bytes = partial(_advance, progress)
    if options.workers > 1 and shards:
        return ProcessExecutor(min(options.workers, shards), lock, on_bytes, WORKER_PRELOAD)
    return InlineExecutor(on_bytes)


def _advance(progress: Progress, shard: str, tensor: str, source_bytes: int) -> None:
    progress.advance(TASK, shard, source_bytes, tensor)


def _require_room(
    source: Source, survey: Survey, output: Path, remaining: list[ShardSource], held_bytes: int | None = None
) -> None:
    """Stop before the first byte if what is still to be written does not fit beside the shards in flight.

    `held_bytes`: what those take, where it is not the usual two.
    """
    for room in room_needed(source, survey, [shard.file for shard in remaining], output, held_bytes):
        if room.needed_bytes > room.free_bytes:
            raise DiskSpaceError(
                f"{room.directory}: {room.needed_bytes:,} bytes are needed, {room.free_bytes:,} are free",
                hint="Make room, or choose a directory on another disk.",
            )


def _copy_file(source: Source, file_name: str, output: Path) -> None:
    with source.fetch(file_name) as local:
        sha256 = copy_file(local.path, output / file_name)
    if local.sha256 is not None and sha256 != local.sha256:
        (output / file_name).unlink(missing_ok=True)
        raise CorruptShardError(
            f"{file_name}: its sha256 is not the one that the Hub published ({local.sha256})",
            hint="Run the same command again.",
        )


def _keep_what_leads_to_the_weights(source: Source, survey: Survey) -> None:
    """Fetch the files that were only read, not copied: without them nobody finds the kept shards offline."""
    for file_name in (CONFIG_FILE if survey.has_config else None, survey.weights.index_file):
        if file_name is not None:
            with source.fetch(file_name):
                pass
