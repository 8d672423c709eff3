"""The shards of a conversion as tasks on a cluster, from the machine that drives it.

Owns when a shard is started, and how what the workers tell becomes the one progress. Knows no cluster by name.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from int8cli.conversion.announce import TASK, advance, shard_outcome
from int8cli.conversion.column_source import KnownColumns, Ready, RequireRoom
from int8cli.conversion.late import comes_true
from int8cli.conversion.task import ShardTask
from int8cli.conversion.worker_job import TellCall, WorkerJob, WorkerResult
from int8cli.errors import ClusterError
from int8cli.planning.exponents import TensorExponents
from int8cli.progress import BYTES, Progress
from int8cli.records.conversion import FROM_ACTIVATIONS, FROM_WEIGHTS
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore
from int8cli.workers.processes import OnBytes

_MODEL = "the run of the model"  # the name of the task that runs the model: shards have others
Needs = TypeVar("Needs", contravariant=True)


class Session(Protocol[Needs]):
    """Tasks that run at the same time; see `workers.ray_session`."""

    def start(self, name: str, task: Callable[[OnBytes], Any], /) -> None: ...

    def lead(self, name: str, task: Callable[[TellCall], Any], needs: Needs, /) -> None: ...

    def ended(self) -> Iterator[tuple[str, Any]]: ...


class Cluster(Protocol[Needs]):
    """Runs tasks elsewhere. `on_told` is called here with what a leading task tells."""

    def session(
        self, on_bytes: OnBytes, on_told: Callable[[Any], None] = ..., /
    ) -> AbstractContextManager[Session[Needs]]: ...


@dataclass(frozen=True, slots=True)
class ClusterRun:
    """A conversion whose shards are converted by a cluster.

    `outliers` says, as in `Settings`, what has to be learned of all shards before one can be converted. `model_needs`
    are what the cluster has to offer for a run of the model.
    """

    cluster: Cluster[Any]
    job: WorkerJob
    outliers: str
    progress: Progress
    model_needs: Any = None

    def __call__(
        self,
        tasks: Sequence[ShardTask],
        recorded: Mapping[str, TensorExponents],
        require_room: RequireRoom,
        on_record: Callable[[ShardRecord], None],
    ) -> Mapping[str, ShardRecord]:
        """Convert and record the shards of these tasks.

        `recorded` are the exponents of shards that are finished, `require_room` is that of ColumnSource. `on_record` is
        told of each shard once it is recorded and, where that is the worker's job, handed on. Raises ClusterError if
        what a worker has written is not in the output directory as this machine sees it.
        """
        by_name = {task.source.file: _anywhere(task) for task in tasks}
        if not by_name:
            return {}
        if self.outliers == FROM_WEIGHTS:
            self._scan(by_name)
        shards = _Shards(by_name, self.job, self.progress, on_record)
        heard = _Heard(self.progress, shards.start, require_room)
        with self.cluster.session(shards.counted, lambda call: call(heard)) as session:
            shards.session = session
            if self.outliers == FROM_ACTIVATIONS:
                directory = next(iter(by_name.values())).directory
                run = partial(self.job.run_model, directory, tuple(by_name), recorded)
                session.lead(_MODEL, run, self.model_needs)
            else:
                for name in by_name:
                    shards.start(name)
            for name, result in session.ended():
                if name != _MODEL:
                    shards.finish(name, result)
                    continue
                for shard, columns in result.items():
                    shards.start(shard, columns)
        return shards.records

    def _scan(self, tasks: Mapping[str, ShardTask]) -> None:
        with self.cluster.session(lambda *_: None) as session:
            for name, task in tasks.items():
                session.start(name, partial(self.job.scan, task))
            for _ in session.ended():
                pass


@dataclass(slots=True)
class _Shards:
    """The shards of one run: what was started and what is finished."""

    tasks: Mapping[str, ShardTask]
    job: WorkerJob
    progress: Progress
    on_record: Callable[[ShardRecord], None]
    records: dict[str, ShardRecord] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)
    session: Any = None
    counted: "_Counted" = field(init=False)

    def __post_init__(self) -> None:
        self.counted = _Counted(self.progress)

    def start(self, name: str, columns: KnownColumns | None = None) -> None:
        """Start a shard, with these columns, unless it was started before: a lost run of the model names it again."""
        if name in self.started:
            return
        self.started.add(name)
        if columns is None and isinstance(self.job.columns, Ready):
            columns = self.job.columns.columns.known(name)
        job = self.job if columns is None else self.job.with_columns(columns)
        self.session.start(name, partial(job.convert, self.tasks[name]))

    def finish(self, name: str, result: WorkerResult) -> None:
        task, record = self.tasks[name], result.record
        _require_seen_here(task, result)
        self.counted.complete(name, task.tensor_bytes)
        self.progress.done(TASK, name, shard_outcome(record))
        self.records[name] = record
        self.on_record(record)


@dataclass(frozen=True, slots=True)
class _Heard(Progress):
    """What the run of the model tells, through calls of these methods."""

    progress: Progress
    released: Callable[[str, KnownColumns], None]
    require_room: RequireRoom

    def begin(self, task: str, parts: Mapping[str, int], *, unit: str = BYTES, finished: Collection[str] = ()) -> None:
        self.progress.begin(task, parts, unit=unit, finished=finished)

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
        self.progress.advance(task, part, amount, detail)

    def note(self, message: str) -> None:
        self.progress.note(message)

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
        self.progress.done(task, part, outcome)


def _anywhere(task: ShardTask) -> ShardTask:
    """The task with a path that does not depend on the directory in which a process was started."""
    return replace(task, directory=task.directory.absolute(), partial=task.partial.absolute())


def _require_seen_here(task: ShardTask, result: WorkerResult) -> None:
    """Wait until this machine sees what was recorded of a finished shard.

    Of a shard that was handed on, that is the record of it: the shard itself may still be seen where it was removed.
    """
    store = RecordStore(task.directory)

    def seen() -> bool:
        if result.upload is not None:
            found = store.uploaded(task.source)  # a late attempt may have written it again, with other marks
            return found is not None and found.repository == result.upload.repository
        return store.finished(task.source) is not None

    if not comes_true(seen):
        raise ClusterError(
            f"a worker has written {task.source.output}, but it is not in {task.directory} on this machine",
            hint="The output must be a directory that all machines of the cluster see under the same path.",
        )


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
