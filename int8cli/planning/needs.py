"""The download, disk space and memory that a conversion needs. Needs no torch."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from int8cli.checkpoint.source import Source
from int8cli.planning.room import ONE_PROCESS, AtOnce, Room, room_needed
from int8cli.planning.survey import Survey


@dataclass(frozen=True, slots=True)
class Needs:
    """What a conversion needs, in bytes. `buffer_bytes` is its memory besides Python with torch imported."""

    download_bytes: int
    disks: tuple[Room, ...]
    buffer_bytes: int

    @classmethod
    def of(
        cls,
        source: Source,
        survey: Survey,
        output: Path,
        *,
        threads: int,
        at_once: AtOnce = ONE_PROCESS,
        shards: Collection[str] | None = None,
    ) -> "Needs":
        """`shards` are the source files to convert, None for all."""
        wanted = [each for each in survey.shards if shards is None or each.file_name in shards]
        names = [contents.file_name for contents in wanted]
        download = sum(contents.file_bytes for contents in wanted if source.transfers(contents.file_name))
        rooms = room_needed(source, survey, names, output, at_once)
        return cls(download, rooms, threads * survey.buffer_bytes_a_thread)
