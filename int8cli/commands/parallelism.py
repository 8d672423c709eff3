"""How many processes and threads a command uses, and when they start."""

import os
from contextlib import suppress
from pathlib import Path

from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.source import Source
from int8cli.commands.options import ConvertOptions, DeviceName
from int8cli.conversion import WORKER_PRELOAD
from int8cli.machine.speed import usable_cores
from int8cli.model.extra import has_transformers
from int8cli.planning.blocks import THREADS_FOR_A_SHARD
from int8cli.planning.output_files import REPORT_FILE
from int8cli.planning.survey import Survey
from int8cli.records.conversion import FROM_WEIGHTS, NO_OUTLIERS
from int8cli.workers.processes import start_server

# With more workers, the disk is the bottleneck. With fewer bytes, starting the processes costs more than it saves.
MOST_WORKERS = 8
LEAST_BYTES_FOR_WORKERS = 10**9


def choose_workers(source: Source, survey: Survey, device: DeviceName) -> int:
    """One process per core, because threads of one process slow each other down.

    Only one process if the network is the bottleneck, and for a GPU: its threads mostly wait, and each process would
    use GPU memory.
    """
    if device == "cuda" or not isinstance(source, DirectorySource):
        return 1
    return _workers_over(len(survey.shards), survey.source_bytes)


def choose_threads(workers: int, device: DeviceName) -> int:
    """Threads per process. With a GPU always the maximum, because the threads mostly wait for the disk or the GPU."""
    if device == "cuda":
        return THREADS_FOR_A_SHARD
    return max(1, min(THREADS_FOR_A_SHARD, usable_cores() // workers))


def start_workers_early(model: str, output: Path, options: ConvertOptions) -> None:
    """Start the server of worker processes, which imports torch while this process reads headers.

    Does nothing if workers are unlikely to be needed. A server that is never used ends with this process.
    """
    if options.device != "cpu" or options.ray is not None or options.finish:
        return
    if str(options.outliers) not in (NO_OUTLIERS, FROM_WEIGHTS) and has_transformers():
        return  # a calibration may convert in this process, and imports torch here
    directory = Path(os.path.expanduser(model))
    with suppress(OSError):  # the code that needs an unreadable file reports it
        files = list(directory.glob("*.safetensors")) or list(directory.glob("*.bin"))
        size_bytes = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
        workers = options.workers or _workers_over(len(files), size_bytes)
        if files and workers > 1 and not (output / REPORT_FILE).exists():  # a finished conversion has a report
            start_server(WORKER_PRELOAD)


def _workers_over(shards: int, source_bytes: int) -> int:
    return max(1, min(shards, usable_cores(), MOST_WORKERS)) if source_bytes >= LEAST_BYTES_FOR_WORKERS else 1
