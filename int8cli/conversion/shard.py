"""One shard on this machine, from its header to its record.

Owns when its output files get their final names: after every byte has been read, if the source's digest is right and
no value requires another plan.
"""

from contextlib import ExitStack
from dataclasses import replace

from int8cli.checkpoint.digest import new_digest, require_published
from int8cli.checkpoint.source import LocalFile
from int8cli.checkpoint.tensor import TORCH_NAMES
from int8cli.checkpoint.writer import ShardWriter
from int8cli.conversion.open_shard import OpenShard, open_shard
from int8cli.conversion.pass_ledger import PassResult
from int8cli.conversion.task import ShardTask
from int8cli.planning.decisions import Decision
from int8cli.planning.layouts import Layout
from int8cli.planning.output_files import OutputShard, output_specs
from int8cli.records.shard_record import FileRecord, NonFiniteTensor, ShardRecord, TensorRecord
from int8cli.results.conversion import LayerReport
from int8cli.results.smoothing import LayerSmoothing
from int8cli.results.stored_columns import NOTHING_STORED, StoredColumns
from int8cli.workers.processes import OnBytes


def convert_shard(task: ShardTask, local: LocalFile, on_bytes: OnBytes) -> ShardRecord:
    """Convert one shard on this machine and give it its final name. The caller must record it.

    A weight with non-finite values raises NonFiniteError or, with `keep_non_finite`, stays a float. This
    changes the layout of the output, so the shard is then converted again. Raises CheckpointError, OutputError.
    """
    with open_shard(task, local) as shard:
        result = _attempt(task, shard, on_bytes)
        non_finite = result.non_finite
        if non_finite:
            on_bytes(task.source.file, "", -task.tensor_bytes)
            task = replace(task, planned=task.planned.with_copied(non_finite))
            result = _attempt(task, shard, on_bytes)
    return ShardRecord(
        source=task.source,
        source_sha256=local.sha256,
        source_tensors=tuple(decision.spec for decision in task.planned.plan.decisions),
        files=tuple(_file_record(file, result) for file in task.planned.files),
        layers=tuple(_layer(task, decision, result) for decision in task.planned.plan.quantized),
        non_finite=tuple(NonFiniteTensor(name, str(place)) for name, place in sorted(non_finite.items())),
    )


def _attempt(task: ShardTask, shard: OpenShard, on_bytes: OnBytes) -> PassResult:
    """One pass over a shard. Commits its files, unless a weight that the plan quantizes is not finite."""
    files = task.planned.files
    with ExitStack() as abandoned:
        writers = []
        for file in files:
            writers.append(ShardWriter(task.partial_of(file), file.file_bytes, task.directory))
            abandoned.callback(writers[-1].abandon)
        result = shard.run_pass(task.planned, task.options, writers, on_bytes)
        require_published(task.source.file, shard.local, result.source_sha256)
        if not result.non_finite:
            # The shard itself last: if it exists, its sidecar does too.
            for file, writer in reversed(list(zip(files, writers, strict=True))):
                writer.commit(task.directory / file.file_name)
            abandoned.pop_all()
    return result


def _file_record(output: OutputShard, result: PassResult) -> FileRecord:
    header = new_digest()
    header.update(output.header)
    tensors = tuple(
        TensorRecord(name, place.spec.dtype, place.spec.shape, result.digests[name])
        for name, place in output.tensors.items()
    )
    return FileRecord(output.file_name, output.file_bytes, header.hexdigest(), tensors)


def _layer(task: ShardTask, decision: Decision, result: PassResult) -> LayerReport:
    has_sidecar = task.planned.sidecar is not None
    stored = task.stored.get(decision.spec.name, NOTHING_STORED) if has_sidecar else None
    return layer_report(decision, task.planned.target, result, stored, task.smoothing.get(decision.spec.name))


def layer_report(
    decision: Decision,
    target: Layout,
    result: PassResult,
    stored: StoredColumns | None = None,
    smoothing: LayerSmoothing | None = None,
) -> LayerReport:
    """The report on a layer after the pass that wrote or compared it. Includes its errors if they were measured."""
    data, *companions = output_specs(decision, target)
    return LayerReport(
        name=decision.module,
        kind=decision.kind.removesuffix(".weight"),
        shape=(decision.computed_shape[0], decision.computed_shape[1]),
        source_dtype=TORCH_NAMES[decision.spec.dtype],
        bytes_before=decision.spec.nbytes,
        bytes_after=data.nbytes + sum(spec.nbytes for spec in companions),
        sums=result.sums.get(decision.spec.name),
        stored=stored,
        smoothing=smoothing,
    )
