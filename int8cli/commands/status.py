"""How much of a conversion is finished. Reads records only, and does not disturb a running conversion."""

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from int8cli.checkpoint.disk import system_errors
from int8cli.checkpoint.lock import refuse_if_in_use
from int8cli.checkpoint.reader import read_small
from int8cli.errors import OutputInUseError
from int8cli.planning.share import Share
from int8cli.records.conversion import Conversion
from int8cli.records.manifest import read_manifest
from int8cli.records.part import KnownPart, known_parts
from int8cli.records.store import RecordStore
from int8cli.results.conversion_status import ConversionStatus, PartState, PartStatus, State
from int8cli.typed_json import InvalidJsonError, parse_json

_BLOCKS = "blocks/record.json"  # below the directory of a calibration


@system_errors()
def status(directory: str | Path) -> ConversionStatus:
    """How much of the conversion in `directory` is finished. Raises OutputError for a directory without one."""
    directory = Path(directory)
    store = RecordStore(directory)
    conversion = store.require_conversion()
    uploads = [upload for shard in conversion.shards if (upload := store.uploaded(shard))]
    removed, commit = store.removed(conversion), store.commit()
    finished = [shard for shard in conversion.shards if shard in removed or store.finished(shard) is not None]
    known = known_parts(store.unfinished.parts)
    return ConversionStatus(
        directory=str(directory),
        state="running" if any(part.runs for part in known) else _state(store, directory),
        model=conversion.source.name,
        revision=conversion.source.revision,
        shards=len(conversion.shards),
        shards_finished=len(finished),
        source_bytes=sum(shard.size_bytes for shard in conversion.shards),
        source_bytes_finished=sum(shard.size_bytes for shard in finished),
        blocks_run=len(_finished_blocks(store.unfinished.calibration_directory / _BLOCKS)),
        partial_bytes=_bytes_below(store.unfinished.incoming_directory),
        options=asdict(conversion.settings),
        uploaded_to=" and ".join(sorted({upload.repository for upload in uploads})) or None,
        shards_uploaded=len(uploads),
        shards_removed=len(removed),
        commit=None if commit is None else commit.commit,
        parts=_parts(known, conversion, {shard.file for shard in finished}),
    )


def _parts(known: Sequence[KnownPart], conversion: Conversion, finished: Collection[str]) -> tuple[PartStatus, ...]:
    """The parts that were started, in order. Processes that only conclude are none."""
    sizes = {shard.file: shard.size_bytes for shard in conversion.shards}
    by_share: dict[tuple[int, int], list[KnownPart]] = {}
    for each in known:
        if each.record.parts:
            by_share.setdefault((each.record.parts, each.record.part), []).append(each)
    found = []
    for (parts, part), processes in sorted(by_share.items()):
        mine = Share(part, parts).of(sizes)
        done = sum(name in finished for name in mine)
        hosts = tuple(dict.fromkeys(process.record.host for process in processes))
        found.append(PartStatus(part, parts, _part_state(processes, done == len(mine)), len(mine), done, hosts))
    return tuple(found)


def _part_state(processes: Sequence[KnownPart], finished: bool) -> PartState:
    runs = {process.runs for process in processes}
    if True in runs:
        return "running"
    return "finished" if finished else "elsewhere" if None in runs else "stopped"


def _state(store: RecordStore, directory: Path) -> State:
    try:
        refuse_if_in_use(directory, store.own)
    except OutputInUseError:
        return "running"
    return "unfinished" if read_manifest(directory) is None else "finished"


def _finished_blocks(record: Path) -> list[Any]:
    """The names of finished blocks; empty if there is no calibration, or if its record is being replaced now."""
    with suppress(FileNotFoundError, InvalidJsonError):
        document = parse_json(read_small(record))
        if isinstance(document, dict) and isinstance(document.get("finished"), list):
            return list(document["finished"])
    return []


def _bytes_below(directory: Path) -> int:
    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    total = 0
    for parent, _, files in os.walk(directory, onerror=refuse):
        for name in files:
            with suppress(FileNotFoundError):  # converted and removed meanwhile
                total += os.stat(os.path.join(parent, name), follow_symlinks=False).st_size
    return total
