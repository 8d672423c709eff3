"""The messages about a running conversion. Needs no torch."""

from collections.abc import Callable, Collection

from int8cli.planning.survey import Survey
from int8cli.planning.warnings import warnings_of
from int8cli.progress import Progress
from int8cli.records.shard_record import ShardRecord
from int8cli.results.conversion import worst_first
from int8cli.results.units import counted, human_bytes

TASK = "convert"


def begin_conversion(
    progress: Progress, survey: Survey, finished: Collection[str], about_columns: Callable[[], str] | None = None
) -> None:
    """Begin the task. Its parts are the source shards, in tensor bytes; `finished` are those of an earlier run.

    `about_columns` says how outlier columns are chosen, if any are left to choose.
    """
    if finished:
        progress.note(f"resuming: {len(finished)} of {len(survey.shards)} shards already converted")
    if about_columns is not None and len(finished) < len(survey.shards):
        progress.note(about_columns())
    for warning in warnings_of(survey):
        progress.note(warning)
    sizes = {contents.file_name: sum(t.file_nbytes for t in contents.tensors) for contents in survey.shards}
    progress.begin(TASK, sizes, finished=finished)


def advance(progress: Progress, shard: str, tensor: str, source_bytes: int) -> None:
    """Another `source_bytes` bytes of a tensor have been converted."""
    progress.advance(TASK, shard, source_bytes, tensor)


def shard_outcome(record: ShardRecord) -> str:
    """The sizes, layers and worst error of a finished shard, in a few words."""
    outcome = f"{human_bytes(record.source.size_bytes)} → {human_bytes(record.files[0].size_bytes)}"
    if record.layers:
        outcome += f", {counted(len(record.layers), 'layer')}"
        worst = worst_first(record.layers)[0].sums
        outcome += f", worst error {worst.relative_frobenius_error:.4f}" if worst is not None else ""
    if record.non_finite:
        outcome += f", {len(record.non_finite)} not quantized because of NaN or infinity"
    return outcome
