"""Which input columns of each linear a conversion stores exactly, and where that is known from.

Owns the choice and its reasons; `convert` asks, and writes them. Three places to know it from: statistics of a
calibration that was made before, the activations themselves, and, for want of better, the weights.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from int8cli.checkpoint.source import LocalFile
from int8cli.executors import OnBytes, Result
from int8cli.results import StoredColumns

# What columns may be told by, as settings and reports name it.
FROM_ACTIVATIONS = "activations"
FROM_STATISTICS = "statistics"
FROM_WEIGHTS = "weights"

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
