"""A conversion on a Ray cluster: what its workers get, and what is declared for each shard."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from int8cli import __version__
from int8cli.checkpoint.object_store import is_remote
from int8cli.checkpoint.own_files import OwnPath
from int8cli.checkpoint.source import Source
from int8cli.columns.from_weights import SuspectColumns
from int8cli.columns.wanted import ColumnStrategy, ColumnsWanted
from int8cli.commands.options import ConvertOptions
from int8cli.conversion.cluster import ClusterRun, ColumnsOn, RemoteSource, WorkerJob
from int8cli.conversion.column_source import ColumnSource
from int8cli.estimate.ways import TORCH_BYTES
from int8cli.planning.blocks import THREADS_FOR_A_SHARD
from int8cli.planning.survey import Survey
from int8cli.progress import Progress
from int8cli.records.conversion import FROM_WEIGHTS
from int8cli.workers.ray_cluster import RayCluster, TaskNeeds


@contextmanager
def joined_cluster(address: str, survey: Survey, options: ConvertOptions) -> Iterator[RayCluster]:
    """A cluster that is told what one shard takes. Raises MissingRayError, ClusterError, VersionMismatchError."""
    cluster = RayCluster(address, __version__)
    try:
        threads = options.threads or _threads(cluster, len(survey.shards))
        memory_bytes = TORCH_BYTES + threads * survey.buffer_bytes_a_thread + _whole_files(survey)
        cluster.needs = TaskNeeds(threads, memory_bytes, 1 if options.device == "cuda" else 0)
        yield cluster
    finally:
        cluster.close()


def run_on(
    cluster: RayCluster,
    model: str,
    source: Source,
    strategy: ColumnStrategy,
    wanted: ColumnsWanted,
    options: ConvertOptions,
    progress: Progress,
) -> ClusterRun:
    """The conversion of a source's shards by a cluster. `model` is what the user called it."""
    path = Path(model).expanduser()
    place = model if source.identity.on_hub or is_remote(model) else str(path.absolute())
    remote = RemoteSource(place, source.identity, options.keep_source, options.retry_for)
    scans = strategy.settings.outliers == FROM_WEIGHTS
    suspects: ColumnsOn = partial(_suspects, strategy.survey, wanted.limit)
    columns: ColumnsOn = suspects if scans else partial(_same, strategy.columns(progress))
    return ClusterRun(cluster, WorkerJob(remote, columns), scans, progress)


def _threads(cluster: RayCluster, shards: int) -> int:
    """One for each shard while there are more shards than cores; else a share of the cores, on one machine."""
    return max(1, min(THREADS_FOR_A_SHARD, cluster.most_cores, cluster.cores // max(1, shards)))


def _whole_files(survey: Survey) -> int:
    """What a worker needs where a file cannot be read in pieces."""
    return max((contents.file_bytes for contents in survey.shards if not contents.mappable), default=0)


def _suspects(survey: Survey, limit: int, source: Source, state: OwnPath) -> ColumnSource:
    return SuspectColumns(source, survey, limit, state / "suspects")


def _same(columns: ColumnSource, source: Source, state: OwnPath) -> ColumnSource:
    return columns
