"""The shards of a conversion as tasks on a cluster: each worker opens the source itself, converts and records.

Owns what a worker needs to know, and what it does with one shard. The worker that records a shard may be lost before
anybody learns of it: a task that is started again finds the record. Knows no cluster by name.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from int8cli.checkpoint.locate import open_source
from int8cli.checkpoint.own_files import OwnPath
from int8cli.checkpoint.source import Source, SourceIdentity
from int8cli.conversion.announce import TASK, advance, shard_outcome
from int8cli.conversion.column_source import ColumnSource
from int8cli.conversion.task import ShardTask
from int8cli.errors import ClusterError, DigestMismatchError, SourceError
from int8cli.progress import Progress
from int8cli.records.part import new_token
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore
from int8cli.workers.processes import OnBytes, Result

# NFS keeps what it knows of a directory for up to a minute.
_SEEN_WITHIN_S = 90.0
_LOOK_AGAIN_S = 0.2
# The columns of a conversion for a source that a worker has opened. The path is for what is learned of the shards.
ColumnsOn = Callable[[Source, OwnPath], ColumnSource]


class Cluster(Protocol):
    """Runs tasks by name, and yields name and result of each as it ends."""

    def run(
        self, tasks: Mapping[str, Callable[[OnBytes], Result]], on_bytes: OnBytes
    ) -> Iterator[tuple[str, Result]]: ...


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
            download_dir=store.incoming_directory,
            output=output,
            keep_source=self.keep_source,
            retry_for_s=self.retry_for_s,
        )
        if source.identity != self.identity:
            source.close()
            raise SourceError(
                f"a machine of the cluster finds {source.identity.name} under {self.model}, not {self.identity.name}",
                hint="Give a Hub id, or a directory that all machines see under one path.",
            )
        return source


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """What a worker does with a shard, besides the shard's own task."""

    source: RemoteSource
    columns: ColumnsOn

    def convert(self, task: ShardTask, on_bytes: OnBytes) -> ShardRecord:
        """Convert a shard and record it, unless an earlier attempt has. One with a wrong digest is fetched again."""
        with self._opened(task) as (source, store, columns):
            record = store.finished(task.source)
            if record is not None:
                return record
            try:
                return _convert(task, source, store, columns, on_bytes)
            except DigestMismatchError:
                if not source.identity.on_hub:
                    raise
            source.discard(task.source.file)
            return _convert(task, source, store, columns, on_bytes)

    def scan(self, task: ShardTask, on_bytes: OnBytes) -> None:
        """Learn of a shard what the columns of others need."""
        with self._opened(task) as (_, _, columns):
            columns.expect([task.source.file], lambda work: work(on_bytes))

    @contextmanager
    def _opened(self, task: ShardTask) -> Iterator[tuple[Source, RecordStore, ColumnSource]]:
        """The source and the output, under names that no other worker has."""
        output = task.directory
        store = RecordStore(output, new_token())
        with closing(self.source.open(store, output)) as source:
            try:
                state = OwnPath(store.calibration_directory, output, store.aside)
                yield source, store, self.columns(source, state)
            finally:
                store.remove_own_partial_files()


def _convert(
    task: ShardTask, source: Source, store: RecordStore, columns: ColumnSource, on_bytes: OnBytes
) -> ShardRecord:
    from int8cli.conversion.shard import convert_shard

    with source.fetch(task.source.file) as local:
        stored = columns.columns_of(task.source.file, local, lambda work: work(on_bytes))
        own = replace(task, partial=store.partial_directory / task.source.output)
        record = convert_shard(own.storing(stored, columns.smoothing_of(task.source.file)), local, on_bytes)
        store.add(record)
    return record


@dataclass(frozen=True, slots=True)
class ClusterRun:
    """A conversion whose shards are converted by a cluster. `scans`: columns depend on what is in other shards."""

    cluster: Cluster
    job: WorkerJob
    scans: bool
    progress: Progress

    def __call__(self, tasks: Sequence[ShardTask]) -> Mapping[str, ShardRecord]:
        """Convert and record the shards of these tasks.

        Raises ClusterError if what a worker has written is not in the output directory as this machine sees it.
        """
        by_name = {task.source.file: _anywhere(task) for task in tasks}
        if self.scans:
            scans = {name: partial(self.job.scan, task) for name, task in by_name.items()}
            for _ in self.cluster.run(scans, lambda *_: None):
                pass
        counted = _Counted(self.progress)
        records = {}
        works = {name: partial(self.job.convert, task) for name, task in by_name.items()}
        for name, record in self.cluster.run(works, counted):
            _require_seen_here(by_name[name])
            counted.complete(name, by_name[name].tensor_bytes)
            self.progress.done(TASK, name, shard_outcome(record))
            records[name] = record
        return records


def _anywhere(task: ShardTask) -> ShardTask:
    """The task with a path that does not depend on the directory in which a process was started."""
    return replace(task, directory=task.directory.absolute(), partial=task.partial.absolute())


def _require_seen_here(task: ShardTask) -> None:
    """Wait until this machine sees a finished shard. File systems of a network show new files late."""
    deadline_s = time.monotonic() + _SEEN_WITHIN_S
    while RecordStore(task.directory).finished(task.source) is None:
        if time.monotonic() > deadline_s:
            raise ClusterError(
                f"a worker has written {task.source.output}, but it is not in {task.directory} on this machine",
                hint="The output must be a directory that all machines of the cluster see under the same path.",
            )
        time.sleep(_LOOK_AGAIN_S)


class _Counted:
    """Reports to a progress, and what is missing of a shard once it is finished. Reports that come later are late."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._totals: dict[str, int] = {}
        self._finished: set[str] = set()

    def __call__(self, shard: str, tensor: str, count: int) -> None:
        if shard not in self._finished:
            self._totals[shard] = self._totals.get(shard, 0) + count
            advance(self._progress, shard, tensor, count)

    def complete(self, shard: str, tensor_bytes: int) -> None:
        self(shard, "", tensor_bytes - self._totals.get(shard, 0))
        self._finished.add(shard)
