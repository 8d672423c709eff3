"""Pushes a finished conversion: what `ShardUploads` does while shards are converted, with all of them converted."""

from contextlib import closing
from pathlib import Path

from int8cli.checkpoint.lock import locked
from int8cli.errors import ShardsRemovedError
from int8cli.progress import Progress
from int8cli.records.conversion import Conversion
from int8cli.records.store import RecordStore
from int8cli.results.push import Pushed
from int8cli.upload.shard_uploads import ShardUploads
from int8cli.upload.target import Target


def push_finished(
    directory: Path, conversion: Conversion, target: Target, message: str | None, progress: Progress
) -> Pushed:
    """Upload what the target lacks of the conversion in `directory`, and commit all of it.

    Raises ShardsRemovedError for shards that are neither here nor there, and what `Target` raises.
    """
    store = RecordStore(directory)
    with locked(directory, store.own):
        records = {shard.file: record for shard in conversion.shards if (record := store.record(shard))}
        sizes = {record.source.output: sum(file.size_bytes for file in record.files) for record in records.values()}
        with closing(ShardUploads(target, directory, sizes, message, progress)) as uploads:
            there = uploads.resume(conversion, conversion.shards)
            for shard in conversion.shards:
                if shard.file not in there and store.finished(shard) is None:
                    raise ShardsRemovedError(
                        f"{shard.output} is neither in {directory} nor in {target.name}",
                        hint="Run the same convert command again: it converts that shard again.",
                    )
            return uploads.publish(conversion, records)
