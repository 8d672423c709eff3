"""One shard that is on this machine, from its header to its record.

Owns when the file it makes may have its name: after every byte was read, the source's digest held, and nothing turned
up that asks for another layout.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial

from int8cli.checkpoint.digest import SourceDigest, new_digest
from int8cli.checkpoint.index import read_contents
from int8cli.checkpoint.pickled import load_legacy
from int8cli.checkpoint.reader import FileReader, ShardReader, TensorsReader
from int8cli.checkpoint.source import LocalFile
from int8cli.checkpoint.tensor import TORCH_NAMES
from int8cli.checkpoint.writer import ShardWriter
from int8cli.conversion.shard_pass import PassResult, ShardPass, Sidecar
from int8cli.conversion.task import ShardTask
from int8cli.errors import DigestMismatchError
from int8cli.planning.layouts import LAYOUTS, Layout
from int8cli.planning.output_files import OutputShard, output_specs, plan_output_shard, plan_sidecar
from int8cli.planning.plan import Decision, Plan
from int8cli.planning.survey import decisions_by_name
from int8cli.records.store import FileRecord, ShardRecord, TensorRecord
from int8cli.results.conversion import LayerReport, StoredColumns
from int8cli.workers.processes import OnBytes


def convert_shard(task: ShardTask, local: LocalFile, on_bytes: OnBytes) -> ShardRecord:
    """Convert one shard that is on this machine and put it under its final name; the caller records it.

    A weight with non-finite values either raises or, with `keep_non_finite`, is left in its source dtype: the output's
    layout is then another one, and the shard is done again with it. Raises CheckpointError, OutputError.
    """
    reader = open_reader(task, local)
    try:
        result, outputs, plan = _attempt(task, task.plan, local, reader, on_bytes)
        kept = result.non_finite
        if kept:
            on_bytes(task.source.file, "", -task.tensor_bytes)
            result, outputs, plan = _attempt(task, task.plan.keeping(list(kept)), local, reader, on_bytes)
    finally:
        reader.close()
    return ShardRecord(
        source=task.source,
        source_sha256=local.sha256,
        source_tensors=tuple(decision.spec for decision in plan.decisions),
        files=tuple(_file_record(output, result) for output in outputs),
        layers=tuple(layer_report(each, LAYOUTS[task.target], result, task.stored_in(each)) for each in plan.quantized),
        kept=tuple((name, str(place)) for name, place in sorted(kept.items())),
    )


def _attempt(
    task: ShardTask, plan: Plan, local: LocalFile, reader: ShardReader, on_bytes: OnBytes
) -> tuple[PassResult, tuple[OutputShard, ...], Plan]:
    """One pass over a shard; commits its files unless weights must be kept that the plan would quantize."""
    decisions = decisions_by_name(plan)
    output = plan_output_shard(task.layout, decisions, task.source.output, LAYOUTS[task.target])
    sidecar = plan_task_sidecar(task, decisions)
    with ExitStack() as abandoned:
        writer = ShardWriter(task.partial, output.file_bytes)
        abandoned.callback(writer.abandon)
        beside = None
        if sidecar is not None:
            beside = ShardWriter(task.partial.with_name(f"{task.partial.name}.outliers"), sidecar.output.file_bytes)
            abandoned.callback(beside.abandon)
        with _published_digest(task, local) as digest:
            shard_pass = ShardPass(task.layout, decisions, reader, output, task.options, sidecar)
            in_pass = digest if task.layout.mappable else None
            result = shard_pass.run(writer, partial(on_bytes, task.source.file), in_pass, beside)
        if not result.non_finite:
            if beside is not None and task.sidecar is not None:
                beside.commit(task.sidecar)
            writer.commit(task.output)
            abandoned.pop_all()
    return result, (output,) if sidecar is None else (output, sidecar.output), plan


def plan_task_sidecar(task: ShardTask, decisions: Mapping[str, Decision]) -> Sidecar | None:
    """The shard's second file: as many columns of each linear as were chosen, none of one that is not quantized."""
    if task.sidecar is None:
        return None
    columns = {name: stored.indices for name, stored in task.stored.items() if decisions[name].quantize}
    counts = {name: len(indices) for name, indices in columns.items()}
    output = plan_sidecar(task.layout, decisions, task.source.output, counts)
    return Sidecar(output, columns) if output is not None else None


@contextmanager
def _published_digest(task: ShardTask, local: LocalFile) -> Iterator[SourceDigest | None]:
    """A digest of the source file to feed, checked at the end; None where nothing was published to check it with."""
    if local.sha256 is None:
        yield None
        return
    with closing(FileReader(local.path)) as gaps:
        digest = SourceDigest(gaps, task.source.size_bytes)
        yield digest
        if digest.hexdigest() != local.sha256:
            raise DigestMismatchError(
                f"{task.source.file}: its sha256 is not the one that the Hub published ({local.sha256})",
                hint="Run the same command again; if it comes back, the network or this disk alters data.",
            )


def open_reader(task: ShardTask, local: LocalFile) -> ShardReader:
    """Access to the shard's bytes, after a look that the file is the one whose header the plan was made from."""
    changed = f"{task.source.file}: changed since its header was read"
    if local.path.stat().st_size != task.layout.file_bytes:
        raise DigestMismatchError(changed, hint="Run the same command again.")
    if not task.layout.mappable:
        tensors = load_legacy(local.path)
        return TensorsReader([tensors[stored.spec.name] for stored in task.layout.tensors])
    with open(local.path, "rb") as file:
        if read_contents(file, task.weight_format, task.source.file, task.layout.file_bytes) != task.layout:
            raise DigestMismatchError(changed, hint="Run the same command again.")
    return FileReader(local.path)


def _file_record(output: OutputShard, result: PassResult) -> FileRecord:
    header = new_digest()
    header.update(output.header)
    tensors = tuple(
        TensorRecord(name, place.spec.dtype, place.spec.shape, result.digests[name])
        for name, place in output.tensors.items()
    )
    return FileRecord(output.file_name, output.file_bytes, header.hexdigest(), tensors)


def layer_report(
    decision: Decision, target: Layout, result: PassResult, stored: StoredColumns | None = None
) -> LayerReport:
    """What there is to say of a layer after the pass that made or compared it; its errors where that measured them."""
    data, *companions = output_specs(decision, target)
    return LayerReport(
        name=decision.module,
        kind=decision.kind.removesuffix(".weight"),
        shape=(data.shape[0], data.shape[1]),
        source_dtype=TORCH_NAMES[decision.spec.dtype],
        bytes_before=decision.spec.nbytes,
        bytes_after=data.nbytes + sum(spec.nbytes for spec in companions),
        sums=result.sums.get(decision.spec.name),
        stored=stored,
    )
