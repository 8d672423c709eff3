"""How far a conversion is, as plain objects with their JSON form."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

STATUS_SCHEMA = "int8cli.status/1"

State = Literal["finished", "running", "unfinished"]
# `elsewhere`: it was started on another machine, and is not finished. Whether it still runs cannot be told from here.
PartState = Literal["finished", "running", "stopped", "elsewhere"]


@dataclass(frozen=True, slots=True)
class PartStatus:
    """A part of a conversion that was started: its shards, those of them that are finished, and where it ran."""

    part: int
    parts: int
    state: PartState
    shards: int
    shards_finished: int
    hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConversionStatus:
    """How far the conversion in a directory is.

    `running`: a process holds the directory. Shards and their bytes are those of the source. `blocks_run` counts the
    blocks of the model that a calibration has finished. `partial_bytes` of downloads are here and will be resumed.
    `shards_uploaded` of the finished shards were uploaded to the repository `uploaded_to`, and `shards_removed` of them
    are not here any more. `commit` names all files there; None until then.
    `options` are the settings of the conversion, by the names of `convert`'s options. `parts` are those that were
    started, while the conversion is not finished.
    """

    directory: str
    state: State
    model: str
    revision: str | None
    shards: int
    shards_finished: int
    source_bytes: int
    source_bytes_finished: int
    blocks_run: int
    partial_bytes: int
    options: dict[str, Any]
    uploaded_to: str | None = None
    shards_uploaded: int = 0
    shards_removed: int = 0
    commit: str | None = None
    parts: tuple[PartStatus, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"schema": STATUS_SCHEMA, **asdict(self)}
