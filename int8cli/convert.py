"""Converting a checkpoint: one shard, then all of them.

Owns the order of the work and what makes it resumable: a finished shard is renamed into place and then recorded, and
config.json and the index, without which no loader opens a directory, come last. Prints nothing; an Observer is told.
"""

import json
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from int8cli.checkpoint.index import WeightFormat, read_layout
from int8cli.checkpoint.pickled import load_legacy
from int8cli.checkpoint.reader import FileReader, ShardReader, TensorsReader
from int8cli.checkpoint.source import LocalFile, Source
from int8cli.checkpoint.tensor import ShardLayout, TensorSpec
from int8cli.checkpoint.writer import ShardWriter, copy_file, write_file
from int8cli.digest import SourceDigest, new_digest
from int8cli.errors import CorruptShardError, DigestMismatchError, DiskSpaceError, WorkerLostError
from int8cli.executors import Executor, InlineExecutor, OnBytes, ProcessExecutor
from int8cli.layouts import LAYOUTS, Layout
from int8cli.manifest import MANIFEST_FILE, write_manifest
from int8cli.output import OutputShard, output_specs, plan_output_shard
from int8cli.plan import Decision, Plan
from int8cli.records import (
    Conversion,
    FileRecord,
    RecordStore,
    Settings,
    ShardRecord,
    ShardSource,
    TensorRecord,
    locked,
)
from int8cli.results import ConversionReport, LayerReport, worst_first
from int8cli.shard import PassOptions, PassResult, ShardPass
from int8cli.survey import CONFIG_FILE, Survey, decisions_by_name, fingerprint, group_by_kind, room_needed

CARD_FILE = "README.md"
REPORT_FILE = "int8/report.json"
INDEX_FILE = "model.safetensors.index.json"
SOURCE_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
VIA_FLOAT16 = "float16"


class Observer:
    """Is told how a conversion goes. Every method may be overridden; calls may come from another thread."""

    def started(self, survey: Survey, finished: frozenset[str]) -> None:
        """The work begins; `finished` names the source shards that an earlier run has done."""

    def shard_started(self, shard: str) -> None: ...

    def progressed(self, shard: str, tensor: str, source_bytes: int) -> None:
        """`source_bytes` more of a shard's tensors are converted; less, where it must be begun again."""

    def shard_finished(self, shard: str, record: ShardRecord) -> None: ...

    def noted(self, message: str) -> None:
        """Something the user should know that is not an error."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert, besides the settings that decide the result.

    `workers` processes convert side by side, each with `threads` threads. `overwrite` starts anew in a directory that
    holds an earlier conversion.
    """

    output: Path
    on_nonfinite: Literal["error", "keep"] = "error"
    overwrite: bool = False
    workers: int = 1
    threads: int = 2
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class ShardTask:
    """All that a process needs to convert one shard that is on this machine. Picklable.

    `plan` holds the decisions on this shard's tensors, in their order in the file; `target` names the output's layout.
    """

    source: ShardSource
    weight_format: WeightFormat
    layout: ShardLayout
    plan: Plan
    output: Path
    partial: Path
    options: PassOptions
    target: str

    @property
    def tensor_bytes(self) -> int:
        return sum(stored.spec.nbytes for stored in self.layout.tensors)


def convert(
    source: Source,
    survey: Survey,
    settings: Settings,
    options: ConvertOptions,
    render_card: Callable[[ConversionReport, Survey], str],
    observer: Observer,
) -> ConversionReport:
    """Convert what `survey` found in `source` into `options.output`, going on where an earlier run stopped.

    `render_card` makes the output's README.md from the report. Raises Int8cliError; whatever is raised, no file stands
    half-written under a final name, and the same call goes on from there.
    """
    with locked(options.output) as lock:
        store = RecordStore(options.output)
        if options.overwrite:
            store.clear()
        conversion = describe(source, survey, settings)
        store.begin(conversion)
        shutil.rmtree(store.partial_directory, ignore_errors=True)
        records = {shard.file: record for shard in conversion.shards if (record := store.finished(shard))}
        remaining = [shard for shard in conversion.shards if shard.file not in records]
        _require_room(source, survey, options.output, remaining)
        observer.started(survey, frozenset(records))
        for file_name in survey.weights.copied:
            _copy_file(source, file_name, options.output)
        if source.keeps_in is not None:
            _keep_what_leads_to_the_weights(source, survey)
        executor = _executor(options, len(remaining), lock, observer)
        try:
            tasks = [_task(shard, survey, settings, options, store) for shard in remaining]
            records.update(_convert_shards(source, tasks, executor, store, observer))
        finally:
            executor.close()
        report = _finish(survey, conversion, [records[shard.file] for shard in conversion.shards], options, render_card)
        # What a killed run fetched and a later one had no use for would otherwise stay for good.
        for directory in (store.partial_directory, store.incoming_directory):
            shutil.rmtree(directory, ignore_errors=True)
        return report


def describe(source: Source, survey: Survey, settings: Settings) -> Conversion:
    """The conversion as the records hold it: what decides its bytes, and every file that it will write."""
    shards = tuple(
        ShardSource(
            layout.file_name,
            layout.file_bytes,
            fingerprint(source, layout.file_name),
            survey.outputs[layout.file_name].file_name,
        )
        for layout in survey.layouts
    )
    files = [shard.output for shard in shards] + list(survey.weights.copied) + [CARD_FILE, REPORT_FILE]
    files += [CONFIG_FILE] if survey.has_config else []
    files += [INDEX_FILE] if len(shards) > 1 else []
    files += [MANIFEST_FILE]
    return Conversion(survey.identity, settings, survey.plan_digest, shards, tuple(files))


def convert_shard(task: ShardTask, local: LocalFile, on_bytes: OnBytes) -> ShardRecord:
    """Convert one shard that is on this machine and put it under its final name; the caller records it.

    A weight with non-finite values either raises or, with `keep_non_finite`, is left in its source dtype: the output's
    layout is then another one, and the shard is done again with it. Raises CheckpointError, OutputError.
    """
    reader = open_reader(task, local)
    try:
        result, output, plan = _attempt(task, task.plan, local, reader, on_bytes)
        kept = result.non_finite
        if kept:
            on_bytes(task.source.file, "", -task.tensor_bytes)
            result, output, plan = _attempt(task, task.plan.keeping(list(kept)), local, reader, on_bytes)
    finally:
        reader.close()
    return ShardRecord(
        source=task.source,
        source_sha256=local.sha256,
        source_tensors=tuple(decision.spec for decision in plan.decisions),
        files=(_file_record(output, result),),
        layers=tuple(layer_report(decision, output.target, result) for decision in plan.quantized),
        kept=tuple((name, str(place)) for name, place in sorted(kept.items())),
    )


def _attempt(
    task: ShardTask, plan: Plan, local: LocalFile, reader: ShardReader, on_bytes: OnBytes
) -> tuple[PassResult, OutputShard, Plan]:
    """One pass over a shard; commits the file unless weights must be kept that the plan would quantize."""
    decisions = decisions_by_name(plan)
    output = plan_output_shard(task.layout, decisions, task.source.output, LAYOUTS[task.target])
    writer = ShardWriter(task.partial, output.file_bytes)
    try:
        digest = SourceDigest(FileReader(local.path), task.source.size_bytes) if local.sha256 else None
        shard_pass = ShardPass(task.layout, decisions, reader, output, task.options)
        in_pass = digest if task.layout.mappable else None
        result = shard_pass.run(writer, partial(on_bytes, task.source.file), in_pass)
        if result.non_finite:
            writer.abandon()
            return result, output, plan
        if digest is not None and digest.hexdigest() != local.sha256:
            raise DigestMismatchError(
                f"{task.source.file}: its sha256 is not the one that the Hub published ({local.sha256})",
                hint="Run the same command again; if it comes back, the network or this disk alters data.",
            )
        writer.commit(task.output)
    except BaseException:
        writer.abandon()
        raise
    return result, output, plan


def open_reader(task: ShardTask, local: LocalFile) -> ShardReader:
    """Access to the shard's bytes, after a look that the file is the one whose header the plan was made from."""
    changed = f"{task.source.file}: changed since its header was read"
    if local.path.stat().st_size != task.layout.file_bytes:
        raise DigestMismatchError(changed, hint="Run the same command again.")
    if not task.layout.mappable:
        tensors = load_legacy(local.path)
        return TensorsReader([tensors[stored.spec.name] for stored in task.layout.tensors])
    with open(local.path, "rb") as file:
        if read_layout(file, task.weight_format, task.source.file, task.layout.file_bytes) != task.layout:
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


def layer_report(decision: Decision, target: Layout, result: PassResult) -> LayerReport:
    """The figures of one layer, from the pass that made or compared it."""
    data, *companions = output_specs(decision, target)
    return LayerReport(
        name=decision.module,
        kind=decision.kind.removesuffix(".weight"),
        shape=(data.shape[0], data.shape[1]),
        source_dtype=SOURCE_DTYPE_NAMES[decision.spec.dtype],
        bytes_before=decision.spec.nbytes,
        bytes_after=data.nbytes + sum(spec.nbytes for spec in companions),
        sums=result.sums[decision.spec.name],
    )


def _convert_shards(
    source: Source, tasks: list[ShardTask], executor: Executor, store: RecordStore, observer: Observer
) -> dict[str, ShardRecord]:
    """Bring each shard here, hand it to the executor, record it when it is done; the next is fetched meanwhile."""
    records: dict[str, ShardRecord] = {}
    under_way: dict[Future[ShardRecord], tuple[ShardTask, ExitStack]] = {}
    waiting = deque(tasks)
    fetched_again: set[str] = set()

    def finish(future: Future[ShardRecord]) -> None:
        task, held = under_way.pop(future)
        try:
            with held:
                record = future.result()
                store.add(record)
        except DigestMismatchError:
            if not source.identity.on_hub or task.source.file in fetched_again:
                raise
            fetched_again.add(task.source.file)
            source.discard(task.source.file)
            observer.noted(f"{task.source.file}: not what the Hub published; fetching it once more")
            observer.progressed(task.source.file, "", -task.tensor_bytes)
            waiting.append(task)
            return
        except BrokenExecutor as error:
            raise WorkerLostError(
                f"a worker process ended before {task.source.file} was done",
                hint="It may have been killed for want of memory. Run the same command again, with fewer --workers.",
            ) from error
        records[task.source.file] = record
        observer.shard_finished(task.source.file, record)

    try:
        while waiting or under_way:
            while waiting and len(under_way) < executor.slots:
                task, held = waiting.popleft(), ExitStack()
                local = held.enter_context(source.fetch(task.source.file))
                if waiting:
                    source.prefetch(waiting[0].source.file)
                observer.shard_started(task.source.file)
                under_way[executor.submit(partial(convert_shard, task, local))] = (task, held)
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                finish(future)
    except BaseException as error:
        executor.close()
        for _, held in under_way.values():
            held.__exit__(type(error), error, error.__traceback__)
        raise
    return records


def _task(
    shard: ShardSource, survey: Survey, settings: Settings, options: ConvertOptions, store: RecordStore
) -> ShardTask:
    layout = next(layout for layout in survey.layouts if layout.file_name == shard.file)
    own = tuple(survey.decisions[stored.spec.name] for stored in layout.tensors)
    via_half = settings.float32 == VIA_FLOAT16
    return ShardTask(
        source=shard,
        weight_format=survey.weights.format,
        layout=layout,
        plan=replace(survey.plan, decisions=own),
        output=options.output / shard.output,
        partial=store.partial_directory / shard.output,
        options=PassOptions(options.threads, options.device, via_half, options.on_nonfinite == "keep"),
        target=settings.layout,
    )


def _executor(options: ConvertOptions, shards: int, lock: int, observer: Observer) -> Executor:
    workers = min(options.workers, shards)
    if workers > 1:
        return ProcessExecutor(workers, lock, observer.progressed)
    return InlineExecutor(observer.progressed)


def _require_room(source: Source, survey: Survey, output: Path, remaining: list[ShardSource]) -> None:
    """Stop before the first byte if what is still to be written does not fit beside the shards in flight."""
    for room in room_needed(source, survey, [shard.file for shard in remaining], output):
        if room.needed_bytes > room.free_bytes:
            raise DiskSpaceError(
                f"{room.directory}: {room.needed_bytes:,} bytes are needed, {room.free_bytes:,} are free",
                hint="Make room, or choose a directory on another disk with --output.",
            )


def _copy_file(source: Source, file_name: str, output: Path) -> None:
    with source.fetch(file_name) as local:
        sha256 = copy_file(local.path, output / file_name)
    if local.sha256 is not None and sha256 != local.sha256:
        (output / file_name).unlink(missing_ok=True)
        raise CorruptShardError(
            f"{file_name}: its sha256 is not the one that the Hub published ({local.sha256})",
            hint="Run the same command again.",
        )


def _keep_what_leads_to_the_weights(source: Source, survey: Survey) -> None:
    """Fetch the files that were only read, not copied: without them nobody finds the kept shards offline."""
    for file_name in (CONFIG_FILE if survey.has_config else None, survey.weights.index_file):
        if file_name is not None:
            with source.fetch(file_name):
                pass


def _finish(
    survey: Survey,
    conversion: Conversion,
    records: list[ShardRecord],
    options: ConvertOptions,
    render_card: Callable[[ConversionReport, Survey], str],
) -> ConversionReport:
    """Write what speaks of the whole: report, card, index, digests; last, the config.json that makes it loadable."""
    kept = [tensor for record in records for tensor, _ in record.kept]
    plan = survey.plan.keeping(kept)
    report = _report(survey, conversion, records, plan)
    write_file(options.output / REPORT_FILE, _json_bytes(report.to_json()))
    write_file(options.output / CARD_FILE, render_card(report, survey).encode(errors="backslashreplace"))
    if len(records) > 1:
        write_file(options.output / INDEX_FILE, _json_bytes(_index(survey, records)))
    config = _json_bytes(_config(survey, conversion.settings, plan)) if survey.has_config else None
    later = {CONFIG_FILE, CARD_FILE, MANIFEST_FILE, *(record.files[0].file for record in records)}
    on_disk = [name for name in conversion.files if name not in later]
    write_manifest(options.output, on_disk, {CONFIG_FILE: config} if config is not None else {})
    if config is not None:
        write_file(options.output / CONFIG_FILE, config)
    return report


def _report(survey: Survey, conversion: Conversion, records: list[ShardRecord], plan: Plan) -> ConversionReport:
    return ConversionReport(
        model=conversion.source.name,
        revision=conversion.source.revision,
        settings=asdict(conversion.settings),
        layers=worst_first(layer for record in records for layer in record.layers),
        left_alone=group_by_kind(plan.copied),
        passed_over=survey.passed_over,
        unmatched_patterns=plan.unmatched_patterns,
        parameters=plan.parameters,
        source_bytes=survey.source_bytes,
        output_bytes=sum(file.size_bytes for record in records for file in record.files),
        shards=len(records),
    )


def _index(survey: Survey, records: list[ShardRecord]) -> dict[str, Any]:
    shards = [record.files[0] for record in records]
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total_size = sum(TensorSpec(t.name, t.dtype, t.shape).nbytes for shard in shards for t in shard.tensors)
    metadata = {**survey.weights.index_metadata, "total_size": total_size}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _config(survey: Survey, settings: Settings, plan: Plan) -> dict[str, Any]:
    """The source's config.json with this quantization_config in place of any other.

    A config that does not name its dtype leaves loaders to take that of the first float tensor, which in the output is
    a float32 scale: the model's is written down for them.
    """
    config = {key: value for key, value in survey.config.items() if key != "quantization_config"}
    if config.get("dtype") is None and config.get("torch_dtype") is None and plan.dtype is not None:
        config["torch_dtype"] = SOURCE_DTYPE_NAMES[plan.dtype]
    config["quantization_config"] = survey.target.quantization_config(plan, settings.threshold)
    return config


def _json_bytes(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
