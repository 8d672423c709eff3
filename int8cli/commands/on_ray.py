"""A conversion on a Ray cluster: what workers get, and what is declared for each shard and for a run of the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from int8cli import __version__
from int8cli.checkpoint.object_store import is_remote
from int8cli.checkpoint.source import Source
from int8cli.columns.wanted import ColumnStrategy
from int8cli.commands.options import ConvertOptions
from int8cli.commands.push import hand_on_of
from int8cli.conversion.cluster import ClusterRun
from int8cli.conversion.worker_job import RemoteSource, WorkerJob
from int8cli.errors import NotEnoughMemoryError
from int8cli.estimate.ways import TORCH_BYTES, memory_to_run
from int8cli.llm_int8.limits import FINE_STEPS
from int8cli.model.sampling import Sampling
from int8cli.planning.blocks import THREADS_FOR_A_SHARD
from int8cli.planning.survey import Survey
from int8cli.progress import Progress
from int8cli.records.conversion import FROM_ACTIVATIONS
from int8cli.workers.ray_cluster import RayCluster
from int8cli.workers.ray_session import TaskNeeds


@dataclass(frozen=True, slots=True)
class OnCluster:
    """A cluster, and what it converts. `model` is what the user called it."""

    cluster: RayCluster
    model: str
    options: ConvertOptions

    @property
    def model_threads(self) -> int:
        """The cores for a run of the model: those of the largest machine but for one shard, which waits for it.

        With a GPU, of the largest machine that has one.
        """
        return max(1, self.cluster.most_cores(_gpus(self.options)) - self.cluster.needs.cores)

    @property
    def slots(self) -> int:
        """The most shards that are converted at once."""
        return self.cluster.slots

    def run(self, source: Source, strategy: ColumnStrategy, sampling: Sampling, progress: Progress) -> ClusterRun:
        """How the cluster converts by a strategy. Raises NotEnoughMemoryError if no machine can run the model."""
        path = Path(self.model).expanduser()
        place = self.model if source.identity.on_hub or is_remote(self.model) else str(path.absolute())
        remote = RemoteSource(place, source.identity, self.options.keep_source, self.options.retry_for)
        job = WorkerJob(remote, strategy.columns, hand_on_of(self.options))
        outliers = strategy.settings.outliers
        needs = self._model_needs(strategy.survey, sampling) if outliers == FROM_ACTIVATIONS else None
        return ClusterRun(self.cluster, job, outliers, progress, needs)

    def _model_needs(self, survey: Survey, sampling: Sampling) -> TaskNeeds:
        needs = TaskNeeds(self.model_threads, memory_to_run(survey, sampling), _gpus(self.options))
        if not self.cluster.offers(needs):
            raise NotEnoughMemoryError(
                f"no machine of the cluster has {needs} for a run of the model", hint="Use shorter sequences."
            )
        return needs


@contextmanager
def joined_cluster(model: str, address: str, survey: Survey, options: ConvertOptions) -> Iterator[OnCluster]:
    """A cluster that is told what one shard takes. Raises MissingRayError, ClusterError, VersionMismatchError."""
    cluster = RayCluster(address, __version__)
    try:
        gpus = _gpus(options)
        threads = options.threads or _threads(cluster, len(survey.shards), gpus)
        smoothed = replace(survey, smooth=FINE_STEPS)  # how it will be is not known yet, and this takes most
        memory_bytes = TORCH_BYTES + threads * smoothed.buffer_bytes_a_thread + _whole_files(survey)
        cluster.needs = TaskNeeds(threads, memory_bytes, gpus)
        yield OnCluster(cluster, model, options)
    finally:
        cluster.close()


def _gpus(options: ConvertOptions) -> int:
    """What one task takes of a machine's GPUs."""
    return 1 if options.device == "cuda" else 0


def _threads(cluster: RayCluster, shards: int, gpus: int) -> int:
    """One for each shard while there are more shards than cores; else a share of the cores, on one machine."""
    return max(1, min(THREADS_FOR_A_SHARD, cluster.most_cores(gpus), cluster.cores // max(1, shards)))


def _whole_files(survey: Survey) -> int:
    """What a worker needs where a file cannot be read in pieces."""
    return max((contents.file_bytes for contents in survey.shards if not contents.mappable), default=0)
