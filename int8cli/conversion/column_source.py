"""The port through which a conversion learns which input columns of each linear to store exactly.

Owns the protocol, and the source that stores nothing. Who fills it is above: see `columns`.
"""

from collections.abc import Callable, Generator, Mapping
from typing import Protocol

from int8cli.checkpoint.source import LocalFile, ShardFile
from int8cli.results.stored_columns import StoredColumns
from int8cli.workers.processes import OnBytes, Result

# Asked with the most bytes of shards that are on this machine at once; raises DiskSpaceError.
RequireRoom = Callable[[int], None]


class RunTask(Protocol):
    """Runs a picklable task where torch is, as executors do, and waits for its result."""

    def __call__(self, task: Callable[[OnBytes], Result], /) -> Result: ...


class ColumnSource(Protocol):
    """Tells a conversion the columns to store, by tensor."""

    def shards(self, require_room: RequireRoom) -> Generator[ShardFile]:
        """Shards that this reads to know the columns, in its own order, each once its columns are known; else none.

        The conversion converts them from here, so that each is fetched once; the others it fetches itself. A file is
        there until the next one is asked for; a fetched copy is removed then. Whoever stops in the middle closes this:
        fetched copies stay for the next run. A shard may come twice. `require_room` is asked before the first is here.
        """
        yield from ()

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        """The columns for the quantized tensors of a source shard that is on this machine.

        What is best done where shards are converted is given to `run`.
        """


class NoColumns(ColumnSource):
    """Nothing is stored."""

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        return {}
