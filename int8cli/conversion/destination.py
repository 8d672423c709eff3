"""The interface through which a conversion hands its files on while it runs.

Owns the protocol. The implementation is in `upload`; without one, all files stay in the output directory.
"""

from collections.abc import Mapping
from typing import Protocol

from int8cli.records.conversion import Conversion
from int8cli.records.shard_record import ShardRecord


class Destination(Protocol):
    """Takes the files of a conversion, shard by shard. All calls come from one thread, in this order."""

    def resume(self, conversion: Conversion) -> Mapping[str, ShardRecord]:
        """Begin. Returns the records, by source file, of shards that it has and that need not be here.

        Raises ShardsRemovedError for shards that are only at another destination.
        """

    def add(self, record: ShardRecord) -> None:
        """A shard is finished: its files and its record are in the directory. May wait until others are taken."""

    def publish(self, conversion: Conversion, records: Mapping[str, ShardRecord]) -> object:
        """All files are written. Returns when they can be used from the destination, all of them at once."""

    def close(self) -> None:
        """Stop. What was taken stays recorded."""
