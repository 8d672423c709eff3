"""The interface through which a conversion learns which input columns to store exactly, and what to smooth.

Owns the protocol, and the implementation that stores nothing. The other implementations are in `columns`.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from int8cli.checkpoint.own_files import OwnPath
from int8cli.checkpoint.source import LocalFile, ShardFile, Source
from int8cli.planning.exponents import NOT_SMOOTHED, ShardSmoothing, TensorExponents
from int8cli.progress import Progress
from int8cli.results.stored_columns import StoredColumns
from int8cli.workers.processes import OnBytes, Result

# Called with the most bytes of shards that will be on this machine beside what is there. Raises DiskSpaceError.
RequireRoom = Callable[[int], None]


class RunTask(Protocol):
    """Runs a picklable task in a process that has torch, and returns its result."""

    def __call__(self, task: Callable[[OnBytes], Result], /) -> Result: ...


class ColumnSource(Protocol):
    """Determines the columns to store for each tensor."""

    def shards(self, require_room: RequireRoom) -> Generator[ShardFile]:
        """Yield the shards that this source fetches itself, in its own order, each once its columns are known.

        The conversion converts these shards as they are yielded, so that each is fetched once, and fetches all other
        shards itself. A file exists until the next one is requested; then a fetched copy is removed. A caller that
        stops early must close the generator: fetched copies then remain for the next run. A shard may be yielded twice.
        `require_room` is called before the first fetch, and again where a run starts over.
        """
        yield from ()

    def expect(self, shards: Sequence[str], run: RunTask) -> None:
        """Learn what other processes need to know of these shards, which this process is about to convert.

        Called before the first of them, where several processes share the shards. `run` as in `columns_of`.
        """
        return

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        """The columns for the quantized tensors of a source shard that is on this machine.

        Work for a process that has torch goes through `run`.
        """

    def smoothing_of(self, shard: str) -> ShardSmoothing:
        """The smoothing of a source shard, once its columns are known."""
        return NOT_SMOOTHED

    def known(self, shard: str) -> "KnownColumns | None":
        """What is known of a shard's columns without its file; None where the file must be looked at."""
        return None

    def settled(self) -> Mapping[str, TensorExponents]:
        """The exponents of every tensor for which this run has found them, also those that are not scaled."""
        return {}


@dataclass(frozen=True, slots=True)
class KnownColumns(ColumnSource):
    """The columns and the smoothing of one shard. Picklable."""

    stored: Mapping[str, StoredColumns] = field(default_factory=dict)
    smoothing: ShardSmoothing = NOT_SMOOTHED

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        return self.stored

    def smoothing_of(self, shard: str) -> ShardSmoothing:
        return self.smoothing

    def known(self, shard: str) -> "KnownColumns":
        return self


class NoColumns(KnownColumns):
    """Stores no columns."""


# Makes the source of columns, for a source that this process has opened. Picklable: it may be another process. The path
# is for what a later run resumes from.
MakeColumns = Callable[[Source, OwnPath, Progress], ColumnSource]


@dataclass(frozen=True, slots=True)
class Ready:
    """Makes a source of columns that is there already."""

    columns: ColumnSource

    def __call__(self, source: Source, state: OwnPath, progress: Progress) -> ColumnSource:
        return self.columns
