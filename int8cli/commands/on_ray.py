"""A conversion on a Ray cluster: what workers get, and what is declared for each shard and for a run of the model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from int8cli.estimate.ways import RAY_BYTES, TORCH_BYTES, memory_to_run
from int8cli.model.sampling import Sampling
from int8cli.planning.blocks import THREADS_FOR_A_SHARD
from int8cli.planning.needs import ClusterNeeds
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

    def model_threads(self, survey: Survey, sampling: Sampling) -> int:
        """The cores for a run of the model: those of the largest machine but for one shard, which waits for it.

        Of the machines with the memory for it and, with `--device cuda`, a GPU.
        """
        besides = TaskNeeds(0, RAY_BYTES + memory_to_run(survey, sampling), _gpus(self.options))
        return max(1, self.cluster.most_cores(besides) - self.cluster.needs.cores)

    @property
    def threads(self) -> int:
        """The threads of one shard's task."""
        return _threads(self.cluster.needs.cores, self.options)

    @property
    def slots(self) -> int:
        """The most shards that are converted at once."""
        return self.cluster.slots

    def run(self, source: Source, strategy: ColumnStrategy, sampling: Sampling, progress: Progress) -> ClusterRun:
        """How the cluster converts by a strategy. Raises NotEnoughMemoryError if no machine can run the model."""
        path = Path(os.path.expanduser(self.model))
        place = self.model if source.identity.on_hub or is_remote(self.model) else str(path.absolute())
        remote = RemoteSource(place, source.identity, self.options.keep_source, self.options.retry_for)
        job = WorkerJob(remote, strategy.columns, hand_on_of(self.options))
        outliers = strategy.settings.outliers
        return ClusterRun(self.cluster, job, outliers, progress, self._model_needs(strategy, sampling))

    def needs(self, strategy: ColumnStrategy, sampling: Sampling) -> ClusterNeeds:
        """What the tasks of a strategy need. Raises NotEnoughMemoryError if no machine can run the model."""
        return ClusterNeeds(self.slots, self.cluster.needs, self._model_needs(strategy, sampling))

    def _model_needs(self, strategy: ColumnStrategy, sampling: Sampling) -> TaskNeeds | None:
        survey = strategy.survey
        if strategy.settings.outliers != FROM_ACTIVATIONS:
            return None
        threads = self.model_threads(survey, sampling)
        needs = TaskNeeds(threads, RAY_BYTES + memory_to_run(survey, sampling), _gpus(self.options))
        if not self.cluster.offers(needs):
            raise NotEnoughMemoryError(
                f"no machine of the cluster has {needs} for a run of the model", hint="Use shorter sequences."
            )
        return needs


@contextmanager
def joined_cluster(model: str, address: str, survey: Survey, options: ConvertOptions) -> Iterator[OnCluster]:
    """A cluster that is told what one shard of `survey` takes, which says how it will be smoothed, if it is.

    Raises MissingRayError, ClusterError, VersionMismatchError.
    """
    cluster = RayCluster(address, __version__)
    try:
        cluster.needs = _shard_needs(cluster, survey, options)
        yield OnCluster(cluster, model, options)
    finally:
        cluster.close()


def _threads(cores: int, options: ConvertOptions) -> int:
    """As many as cores; with a GPU more, because they mostly wait."""
    return options.threads or (THREADS_FOR_A_SHARD if _gpus(options) else cores)


def _gpus(options: ConvertOptions) -> int:
    """What one task takes of a machine's GPUs."""
    return 1 if options.device == "cuda" else 0


def _shard_needs(cluster: RayCluster, survey: Survey, options: ConvertOptions) -> TaskNeeds:
    """What one shard takes. One core while there are more shards than cores; else a share of them.

    As many of that share as some machine has with the memory for so many threads; one where none has.
    """

    def needs(cores: int) -> TaskNeeds:
        buffers = survey.buffer_bytes(_threads(cores, options))
        return TaskNeeds(cores, RAY_BYTES + TORCH_BYTES + buffers + _whole_files(survey), _gpus(options))

    if options.threads:
        return needs(options.threads)
    share = min(THREADS_FOR_A_SHARD, cluster.cores // max(1, len(survey.shards)))
    return next((each for each in map(needs, range(share, 1, -1)) if cluster.offers(each)), needs(1))


def _whole_files(survey: Survey) -> int:
    """What a worker needs where a file cannot be read in pieces."""
    return max((contents.file_bytes for contents in survey.shards if not contents.mappable), default=0)
