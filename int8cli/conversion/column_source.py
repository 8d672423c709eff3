"""The port through which a conversion learns which input columns of each linear to store exactly.

Owns the protocol, and the source that stores nothing. Who fills it is above: see `columns`.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from int8cli.checkpoint.source import LocalFile
from int8cli.results.stored_columns import StoredColumns
from int8cli.workers.processes import OnBytes, Result

TakeShard = Callable[[str, LocalFile], None]


class RunTask(Protocol):
    """Runs a picklable task where torch is, as executors do, and waits for its result."""

    def __call__(self, task: Callable[[OnBytes], Result], /) -> Result: ...


class ColumnSource(Protocol):
    """Tells a conversion the columns to store, by tensor."""

    def bring(self, take: TakeShard, require_room: Callable[[int], None]) -> None:
        """Bring shards here in an order of its own, where it needs that to know.

        Each is given to `take(file, local)` once its columns are known, and goes when that returns; what is not given
        is converted afterwards. `require_room(bytes)` is told first how many bytes of shards are here at once.
        """

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        """The columns for the quantized tensors of a source shard that is on this machine.

        What is best done where shards are converted is given to `run`.
        """


class NoColumns:
    """Nothing is stored."""

    def bring(self, take: TakeShard, require_room: Callable[[int], None]) -> None:
        pass

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        return {}
