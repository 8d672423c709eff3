"""The room of a conversion on its disks: asked for before anything is written, and made where that is possible.

Owns the refusal. How much is needed is `planning.room`'s.
"""

from collections.abc import Sequence

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.own_files import remove_files_but
from int8cli.checkpoint.source import Source
from int8cli.checkpoint.writer import existing_parent
from int8cli.errors import CacheSpaceError, DiskSpaceError
from int8cli.planning.room import AtOnce, kept_downloads, room_needed
from int8cli.planning.survey import Survey
from int8cli.records.conversion import ShardSource
from int8cli.records.store import RecordStore
from int8cli.results.units import told_apart


def require_room(
    source: Source,
    survey: Survey,
    at_once: AtOnce,
    remaining: Sequence[ShardSource],
    store: RecordStore,
    model_bytes: int = 0,
) -> None:
    """Raise DiskSpaceError if the remaining output and the shards in flight do not fit on their disks.

    `model_bytes` are the most that a run of the model downloads beside what is there. What this process finds of an
    earlier one in `store` is no obstacle.
    """
    names = [shard.file for shard in remaining]
    cache = None if source.keeps_in is None else existing_parent(source.keeps_in)
    for room in room_needed(source, survey, names, store.output, at_once, model_bytes, store.unfinished.left_over):
        if room.needed_bytes > room.free_bytes:
            needed, free = told_apart(room.needed_bytes, room.free_bytes)
            kind = CacheSpaceError if room.directory == cache else DiskSpaceError
            raise kind(
                f"{room.directory} needs {needed}, {free} free",
                hint="Free some space, or choose a directory on another disk.",
            )


def require_room_to_run(
    source: Source,
    survey: Survey,
    at_once: AtOnce,
    remaining: Sequence[ShardSource],
    store: RecordStore,
    model_bytes: int,
) -> None:
    """The same for a run of the model, which may begin again after some of the shards are finished."""
    left = [shard for shard in remaining if not (store.finished(shard) or store.uploaded(shard))]
    require_room(source, survey, at_once, left, store, model_bytes)


def remove_useless_downloads(
    source: Source, survey: Survey, at_once: AtOnce, remaining: Sequence[ShardSource], store: RecordStore
) -> None:
    """Remove what an earlier run has downloaded and this one does not resume: `require_room` has counted it as free."""
    kept = kept_downloads(source, survey, [shard.file for shard in remaining], at_once)
    with disk_errors(store.unfinished.incoming_directory):
        stays = {path for paths in kept.values() for path in paths}
        remove_files_but(stays, store.unfinished.incoming_directory, store.output)
