"""The download, disk space and memory that a conversion needs. Needs no torch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from int8cli.checkpoint.source import Source
from int8cli.planning.room import ONE_PROCESS, AtOnce, Room, model_download_bytes, room_needed
from int8cli.planning.survey import Survey
from int8cli.workers.ray_session import TaskNeeds


@dataclass(frozen=True, slots=True)
class ClusterNeeds:
    """What the tasks of a conversion need on a cluster: each shard's, of which `at_once` run, and a run of the model.

    `model` is None where the model is not run.
    """

    at_once: int
    shard: TaskNeeds
    model: TaskNeeds | None


@dataclass(frozen=True, slots=True)
class Needs:
    """What a conversion needs, in bytes. `buffer_bytes` is its memory besides Python with torch imported.

    On a cluster, `disks` is what all machines have on them together, and `buffer_bytes` that of one shard's task.
    """

    download_bytes: int
    disks: tuple[Room, ...]
    buffer_bytes: int
    cluster: ClusterNeeds | None = None

    @classmethod
    def of(
        cls,
        source: Source,
        survey: Survey,
        output: Path,
        *,
        buffer_bytes: int,
        at_once: AtOnce = ONE_PROCESS,
        shards: Collection[str] | None = None,
        left_over: Sequence[Path] = (),
        cluster: ClusterNeeds | None = None,
    ) -> "Needs":
        """`shards` are the source files to convert, None for all. `left_over` as in `room_needed`."""
        wanted = [each for each in survey.shards if shards is None or each.file_name in shards]
        names = [contents.file_name for contents in wanted]
        download = sum(contents.file_bytes for contents in wanted if source.transfers(contents.file_name))
        runs = cluster is not None and cluster.model is not None
        model_bytes = model_download_bytes(source, survey) if runs else 0
        rooms = room_needed(source, survey, names, output, at_once, model_bytes, left_over)
        return cls(download, rooms, buffer_bytes, cluster)
