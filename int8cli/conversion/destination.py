"""The interfaces through which a conversion hands its files on while it runs.

Owns the protocols. The implementations are in `upload`; without one, all files stay in the output directory.
"""

from collections.abc import Collection, Mapping
from typing import Protocol

from int8cli.records.conversion import Conversion, ShardSource
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore
from int8cli.records.upload_record import UploadRecord


class HandOn(Protocol):
    """Hands on one finished shard of a conversion that others convert too. Picklable."""

    def __call__(self, store: RecordStore, record: ShardRecord) -> UploadRecord | None:
        """The files of a shard and its record are in the store's directory, or have been handed on before.

        Returns the record of what the destination has now, in that directory too; None if it takes the shard later.
        """


class Destination(Protocol):
    """Takes the files of a conversion, shard by shard. All calls come from one thread, in this order."""

    def resume(self, conversion: Conversion, shards: Collection[ShardSource]) -> Mapping[str, ShardRecord]:
        """Begin with these shards of the conversion: all of them, or those of a part.

        Returns the records, by source file, of those that it has and that need not be here. Raises ShardsRemovedError
        for shards that are only at another destination.
        """

    def add(self, record: ShardRecord) -> None:
        """A shard is finished: its files and its record are in the directory. May wait until others are taken."""

    def taken(self, record: ShardRecord) -> None:
        """A shard was handed on by the process that has converted it."""

    def settle(self) -> None:
        """Wait until everything that was added is taken. Raises what made it fail."""

    def publish(self, conversion: Conversion, records: Mapping[str, ShardRecord]) -> object:
        """All files are written. Returns when they can be used from the destination, all of them at once."""

    def close(self) -> None:
        """Stop. What was taken stays recorded."""
