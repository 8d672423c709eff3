"""What a worker of a cluster does: it opens the source itself, converts a shard, records it and hands it on.

Owns what a worker needs to know. The worker that records a shard may be lost before anybody learns of it: a task that
is started again finds the record. Knows no cluster.
"""

import os
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from operator import methodcaller
from pathlib import Path
from typing import Any

import xxhash

from int8cli.checkpoint.locate import open_source
from int8cli.checkpoint.object_store import shown_address
from int8cli.checkpoint.own_files import OwnPath
from int8cli.checkpoint.source import ShardFile, Source, SourceIdentity
from int8cli.conversion.column_source import ColumnSource, KnownColumns, MakeColumns, Ready, RequireRoom
from int8cli.conversion.destination import HandOn
from int8cli.conversion.late import LATE_S, LOOK_AGAIN_S
from int8cli.conversion.resumed_smoothing import require_same
from int8cli.conversion.task import ShardTask
from int8cli.errors import DigestMismatchError, OutputInUseError, SourceError
from int8cli.model.memory import return_memory_promptly
from int8cli.planning.exponents import TensorExponents
from int8cli.progress import BYTES, SILENT, Progress
from int8cli.records.part import new_token
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore
from int8cli.records.upload_record import UploadRecord
from int8cli.workers.processes import OnBytes

# A worker of Ray has many threads, and malloc would keep the largest buffer of a pass for each that it once was in:
# measured, 4.3 MB more with every shard. What is allocated for each block is smaller.
_LARGE_BYTES = 1 << 22
# Has a method of the driver's listener called there: see `cluster`.
TellCall = Callable[[Callable[[Any], object]], None]


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """How a worker opens the source. `model` is a Hub id, or a path that all machines see."""

    model: str
    identity: SourceIdentity
    keep_source: bool
    retry_for_s: float

    def open(self, store: RecordStore, output: Path) -> Source:
        """Raises SourceError if another model is found there than the driver has found."""
        source = open_source(
            self.model,
            revision=self.identity.revision if self.identity.on_hub else None,
            download_dir=store.unfinished.incoming_directory,
            output=output,
            keep_source=self.keep_source,
            retry_for_s=self.retry_for_s,
        )
        if source.identity != self.identity:
            source.close()
            found, address = source.identity.name, shown_address(self.model)
            raise SourceError(
                f"a machine of the cluster finds {found} under {address}, not {self.identity.name}",
                hint="Give a Hub id, or a directory that all machines see under one path.",
            )
        return source


@dataclass(frozen=True, slots=True)
class WorkerResult:
    """A shard that a worker has recorded. `upload` is what was recorded of handing it on, if anything was."""

    record: ShardRecord
    upload: UploadRecord | None = None


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """What a worker does with a shard, besides the shard's own task. `hand_on` gets what is converted."""

    source: RemoteSource
    columns: MakeColumns
    hand_on: HandOn | None = None

    def with_columns(self, columns: KnownColumns) -> "WorkerJob":
        """The same for one shard whose columns are known."""
        return replace(self, columns=Ready(columns))

    def convert(self, task: ShardTask, on_bytes: OnBytes) -> WorkerResult:
        """Convert a shard, record it and hand it on, as far as no earlier attempt has.

        What a lost attempt that went on beside this one has left is removed then.
        """
        with self._opened(task.directory, task.source.output) as (source, store, columns):
            record = store.finished(task.source)
            if record is None and self.hand_on is not None and store.uploaded(task.source) is not None:
                record = store.record(task.source)
            if record is None:
                record = _convert_as_published(task, source, store, columns, on_bytes)
            upload = None if self.hand_on is None else self.hand_on(store, record)
        store.unfinished.remove_left_over(_attempts(task.source.output))
        return WorkerResult(record, upload)

    def scan(self, task: ShardTask, on_bytes: OnBytes) -> None:
        """Learn of a shard what the columns of others need."""
        with self._opened(task.directory, task.source.output) as (_, _, columns):
            columns.expect([task.source.file], lambda work: work(on_bytes))

    def run_model(
        self, output: Path, shards: Sequence[str], recorded: Mapping[str, TensorExponents], tell: TellCall
    ) -> dict[str, KnownColumns]:
        """Run the model that chooses the columns, and tell of each shard once its columns are known.

        Returns those of all `shards`: what was told may have been lost. The next attempt resumes where this one is
        lost. `recorded` are the exponents of finished shards. Raises SavedStateError if others are found now.
        """

        def check_room(size_bytes: int) -> None:
            tell(methodcaller("require_room", size_bytes))

        with self._opened(output, "", _ToldProgress(tell)) as (_, _, columns):
            with closing(_once_released(columns, check_room)) as released:
                for shard in released:
                    require_same(columns.settled(), recorded)
                    if shard.name in shards:
                        tell(methodcaller("released", shard.name, _known(columns, shard.name)))
            require_same(columns.settled(), recorded)
            return {shard: _known(columns, shard) for shard in shards}

    @contextmanager
    def _opened(
        self, output: Path, shard: str, progress: Progress = SILENT
    ) -> Iterator[tuple[Source, RecordStore, ColumnSource]]:
        """The source and the output, under names that no other worker has, for a shard or for a run of the model.

        What attempts that were lost have left of it is removed first: room was asked for one attempt at a time.
        """
        return_memory_promptly(_LARGE_BYTES)
        store = RecordStore(output, _attempts(shard) + new_token())
        store.unfinished.remove_left_over(_attempts(shard))
        with closing(self.source.open(store, output)) as source:
            try:
                state = OwnPath(store.unfinished.calibration_directory, output, store.unfinished.aside)
                yield source, store, self.columns(source, state, progress)
            finally:
                store.unfinished.remove_partial_files()


def _attempts(shard: str) -> str:
    """How the names begin that belong to attempts at one shard, by its output."""
    return xxhash.xxh3_64_hexdigest(os.fsencode(shard))


def _known(columns: ColumnSource, shard: str) -> KnownColumns:
    known = columns.known(shard)
    assert known is not None  # a run of the model knows them without the file
    return known


def _once_released(columns: ColumnSource, require_room: RequireRoom) -> Generator[ShardFile]:
    """The shards of `columns`, once an attempt that was lost has let go of what it saved."""
    deadline_s = time.monotonic() + LATE_S
    while True:
        with closing(columns.shards(require_room)) as shards:
            try:
                first = next(shards, None)
            except OutputInUseError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(LOOK_AGAIN_S)
                continue
            if first is not None:
                yield first
                yield from shards
            return


def _convert_as_published(
    task: ShardTask, source: Source, store: RecordStore, columns: ColumnSource, on_bytes: OnBytes
) -> ShardRecord:
    """Convert and record a shard. One from the Hub with a wrong digest is fetched again, once."""
    try:
        return _convert(task, source, store, columns, on_bytes)
    except DigestMismatchError:
        if not source.identity.on_hub:
            raise
    source.discard(task.source.file)
    return _convert(task, source, store, columns, on_bytes)


def _convert(
    task: ShardTask, source: Source, store: RecordStore, columns: ColumnSource, on_bytes: OnBytes
) -> ShardRecord:
    from int8cli.conversion.shard import convert_shard

    with source.fetch(task.source.file) as local:
        stored = columns.columns_of(task.source.file, local, lambda work: work(on_bytes))
        own = replace(task, partial=store.unfinished.partial_directory / task.source.output).with_borrowed(source)
        record = convert_shard(own.storing(stored, columns.smoothing_of(task.source.file)), local, on_bytes)
        store.add(record)
    return record


class _ToldProgress(Progress):
    """Has the calls made at the driver's progress."""

    def __init__(self, tell: TellCall) -> None:
        self._tell = tell

    def begin(self, task: str, parts: Mapping[str, int], *, unit: str = BYTES, finished: Collection[str] = ()) -> None:
        self._tell(methodcaller("begin", task, dict(parts), unit=unit, finished=tuple(finished)))

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
        self._tell(methodcaller("advance", task, part, amount, detail))

    def note(self, message: str) -> None:
        self._tell(methodcaller("note", message))

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
        self._tell(methodcaller("done", task, part, outcome))
