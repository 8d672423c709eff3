"""How many processes and threads a command uses, and their early start."""

import os
from contextlib import suppress
from pathlib import Path

from int8cli.commands.options import ConvertOptions, DeviceName
from int8cli.conversion import WORKER_PRELOAD
from int8cli.model.extra import has_transformers
from int8cli.planning.blocks import THREADS_FOR_A_SHARD
from int8cli.planning.output_files import REPORT_FILE
from int8cli.planning.survey import Survey
from int8cli.records.store import FROM_WEIGHTS, NO_OUTLIERS
from int8cli.workers.processes import start_server

# With more, a disk sets the pace; with less to do, the processes' start.
MOST_WORKERS = 8
LEAST_BYTES_FOR_WORKERS = 10**9


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(survey: Survey, device: DeviceName) -> int:
    """A process for every core, since threads of one get in each other's way; one where the network sets the pace.

    One for a GPU, too: its threads wait more than they compute, and each process would take memory of it.
    """
    if device == "cuda" or survey.identity.on_hub:
        return 1
    return _workers_over(len(survey.shards), survey.source_bytes)


def choose_threads(workers: int, device: DeviceName) -> int:
    """Of each process. A GPU gets them all however few the cores: one reads, one waits for the GPU, one writes."""
    if device == "cuda":
        return THREADS_FOR_A_SHARD
    return max(1, min(THREADS_FOR_A_SHARD, usable_cores() // workers))


def start_workers_early(model: str, output: Path, options: ConvertOptions) -> None:
    """Have torch imported for workers while this process reads headers, if some are foreseen.

    Where they are not, it happens when they are needed; a server that was started in vain ends with this process.
    """
    if options.device != "cpu":
        return
    if str(options.outliers) not in (NO_OUTLIERS, FROM_WEIGHTS) and has_transformers():
        return  # a calibration may do the work itself, and has torch imported here
    directory = Path(os.path.expanduser(model))
    with suppress(OSError):  # whoever needs what cannot be read will say so
        files = list(directory.glob("*.safetensors")) or list(directory.glob("*.bin"))
        size_bytes = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
        foreseen = options.workers or _workers_over(len(files), size_bytes)
        if files and foreseen > 1 and not (output / REPORT_FILE).exists():  # which a finished conversion has
            start_server(WORKER_PRELOAD)


def _workers_over(shards: int, source_bytes: int) -> int:
    return max(1, min(shards, usable_cores(), MOST_WORKERS)) if source_bytes >= LEAST_BYTES_FOR_WORKERS else 1
