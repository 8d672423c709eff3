"""What a conversion takes, and the whole of what is known of it beforehand. No torch."""

from dataclasses import dataclass
from pathlib import Path

from int8cli.checkpoint.source import Source
from int8cli.planning.blocks import BUFFER_BYTES_A_THREAD
from int8cli.planning.survey import Room, Survey, room_needed


@dataclass(frozen=True, slots=True)
class Needs:
    """What a conversion takes, in bytes. Memory is what its buffers hold besides Python with torch imported."""

    download_bytes: int
    disks: tuple[Room, ...]
    buffer_bytes: int

    @classmethod
    def of(cls, source: Source, survey: Survey, output: Path, *, threads: int) -> "Needs":
        names = [layout.file_name for layout in survey.layouts]
        download = sum(layout.file_bytes for layout in survey.layouts if source.transfers(layout.file_name))
        return cls(download, room_needed(source, survey, names, output), threads * BUFFER_BYTES_A_THREAD)
