"""Converts a checkpoint: all of its shards, then the files that describe the whole.

Owns the order of the work, which makes it resumable: a shard gets its final name, then its record, and only then is its
fetched source removed. Prints nothing; reports to a Progress.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from int8cli.checkpoint.config_file import CONFIG_FILE
from int8cli.checkpoint.digest import require_published
from int8cli.checkpoint.lock import locked
from int8cli.checkpoint.output_names import remove_files
from int8cli.checkpoint.source import Source
from int8cli.checkpoint.writer import copy_file
from int8cli.conversion import WORKER_PRELOAD
from int8cli.conversion.announce import TASK, advance, begin_conversion
from int8cli.conversion.column_source import ColumnSource, NoColumns, RequireRoom
from int8cli.conversion.destination import Destination
from int8cli.conversion.finish import RenderCard, write_conclusion
from int8cli.conversion.resumed_smoothing import recorded_exponents
from int8cli.conversion.room import remove_useless_downloads, require_room, require_room_to_run
from int8cli.conversion.shard_loop import ShardLoop, ignore
from int8cli.conversion.task import PassOptions, ShardTask
from int8cli.errors import (
    CANNOT_CALIBRATE,
    DigestMismatchError,
    NothingToQuantizeError,
)
from int8cli.planning.exponents import TensorExponents
from int8cli.planning.output_files import CARD_FILE, INDEX_FILE, REPORT_FILE
from int8cli.planning.room import ONE_PROCESS, AtOnce
from int8cli.planning.survey import Survey, fingerprint
from int8cli.progress import Progress
from int8cli.records.conversion import VIA_FLOAT16, Conversion, Settings, ShardSource
from int8cli.records.manifest import MANIFEST_FILE
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore
from int8cli.results.conversion import ConversionReport
from int8cli.workers.processes import Executor, InlineExecutor, ProcessExecutor


class ConvertElsewhere(Protocol):
    """Converts and records shards on other machines."""

    def __call__(
        self,
        tasks: Sequence[ShardTask],
        recorded: Mapping[str, TensorExponents],
        require_room: RequireRoom,
        on_record: Callable[[ShardRecord], None],
        /,
    ) -> Mapping[str, ShardRecord]:
        """The records by source file. See `cluster.ClusterRun`."""


@dataclass(frozen=True, slots=True)
class ConversionRun:
    """How to convert, besides the settings that determine the result.

    `workers` processes convert one shard each, with `threads` threads per process. `overwrite` replaces an earlier
    conversion in the directory. `destination` takes each shard as it is finished. `at_once` says how many shards need
    room. `about_columns` says how outlier columns are chosen.
    """

    output: Path
    on_nonfinite: Literal["error", "keep"] = "error"
    overwrite: bool = False
    workers: int = 1
    threads: int = 2
    device: str = "cpu"
    destination: Destination | None = None
    at_once: AtOnce = ONE_PROCESS
    about_columns: Callable[[], str] | None = None


def convert(
    source: Source,
    survey: Survey,
    settings: Settings,
    options: ConversionRun,
    render_card: RenderCard,
    progress: Progress,
    columns: ColumnSource | None = None,
    elsewhere: ConvertElsewhere | None = None,
) -> ConversionReport:
    """Convert a surveyed source into `options.output`, resuming where an earlier run stopped.

    `columns` determines what to store in sidecars, if the survey has any. `elsewhere` converts and records shards on
    other machines, with columns of its own; without it, this machine converts them. `render_card` makes the README.md
    of the output from the report. Raises Int8cliError. After any exception, no file is half-written under its final
    name, and the same call resumes.
    """
    require_something_to_quantize(survey, settings)
    store = RecordStore(options.output)
    destination = options.destination
    with locked(options.output, store.own) as lock, nullcontext() if destination is None else closing(destination):
        store.refuse_links()
        if options.overwrite:
            store.clear()
        conversion = describe(source, survey, settings)
        store.check(conversion)
        records = finished_records(store, conversion, conversion.shards, destination)
        remaining = [shard for shard in conversion.shards if shard.file not in records]
        require_room(source, survey, options.at_once, remaining, store)
        store.claim(conversion)
        store.unfinished.remove_partial_files()
        store.unfinished.remove_left_over()  # by workers and parts that are not running
        remove_useless_downloads(source, survey, options.at_once, remaining, store)
        begin_conversion(progress, survey, records, options.about_columns)
        copy_files(source, survey, options.output)
        shards = _Shards(source, survey, options, store, lock, progress)
        tasks = [task_of(shard, survey, settings, options, store) for shard in remaining]
        try:
            records |= shards.convert(tasks, records, columns or NoColumns(), elsewhere)
        except CANNOT_CALIBRATE:
            # So that another strategy can use the directory.
            if not any(store.finished(shard) or store.uploaded(shard) for shard in conversion.shards):
                store.clear()
            raise
        progress.done(TASK)
        in_order = [records[shard.file] for shard in conversion.shards]
        report = write_conclusion(survey, conversion, in_order, options.output, render_card)
        if destination is not None:
            destination.publish(conversion, records)
        # This includes shards that a killed run fetched and this run did not need.
        store.unfinished.remove_state()
        return report


@dataclass(frozen=True, slots=True)
class _Shards:
    """What the shards of one conversion are converted with. `lock` is the directory's: workers keep it."""

    source: Source
    survey: Survey
    options: ConversionRun
    store: RecordStore
    lock: int
    progress: Progress

    def convert(
        self,
        tasks: list[ShardTask],
        records: Mapping[str, ShardRecord],
        columns: ColumnSource,
        elsewhere: ConvertElsewhere | None,
    ) -> Mapping[str, ShardRecord]:
        """Convert and record shards beside those that have `records`. Returns the new records, by source file."""
        remaining = [task.source for task in tasks]
        executor = executor_for(self.options, len(tasks) if elsewhere is None else 0, self.lock, self.progress)
        try:
            recorded = recorded_exponents(self.options.output, records.values()) if self.survey.smooth and tasks else {}
            room = partial(require_room_to_run, self.source, self.survey, self.options.at_once, remaining, self.store)
            destination = self.options.destination
            if elsewhere is not None:
                return elsewhere(tasks, recorded, room, ignore if destination is None else destination.taken)
            on_record = ignore if destination is None else destination.add
            loop = ShardLoop(self.source, tasks, executor, self.store, self.progress, columns, recorded, on_record)
            return loop.run(room)
        finally:
            executor.close()
            self.store.unfinished.remove_partial_files()  # an interrupt may have prevented other clean-up


def require_possible(source: Source, survey: Survey, settings: Settings, options: ConversionRun) -> None:
    """Raise now what `convert` would raise before its first byte, as far as that is known without stored columns.

    `convert` checks all of it again, under the directory's lock.
    """
    require_something_to_quantize(survey, settings)
    store = RecordStore(options.output)
    conversion = describe(source, survey, settings)
    remaining = list(conversion.shards)
    if not options.overwrite:
        store.check(conversion, all_files=False)
        remaining = [shard for shard in conversion.shards if not (store.finished(shard) or store.uploaded(shard))]
    require_room(source, survey, options.at_once, remaining, store)


def finished_records(
    store: RecordStore, conversion: Conversion, shards: Collection[ShardSource], destination: Destination | None
) -> dict[str, ShardRecord]:
    """The records of those `shards` that need not be converted, by source file: they are here, or at the destination.

    The destination begins with what is here. Raises ShardsRemovedError for shards that are at another one.
    """
    if destination is None:
        store.refuse_removed(conversion)
    # First: the destination may upload and remove what is here as soon as it resumes.
    here = {shard.file: record for shard in shards if (record := store.finished(shard))}
    there = {} if destination is None else destination.resume(conversion, shards)
    return {**here, **there}


def require_something_to_quantize(survey: Survey, settings: Settings) -> None:
    """Raise NothingToQuantizeError if the patterns leave nothing, or if no tensor is a known linear layer's weight.

    The output would be a copy of a model that was not understood, under the name of int8.
    """
    if survey.plan.quantized:
        return
    if settings.only:
        raise NothingToQuantizeError(
            "no module that could be quantized matches the patterns",
            hint="The plan lists the modules with the reason for each.",
        )
    if not survey.plan.has_linear_layers:
        reasons = Counter(each.reason for each in survey.plan.copied if len(each.spec.shape) >= 2)
        found = ", ".join(f"{count:,} {reason!r}" for reason, count in reasons.most_common(3))
        raise NothingToQuantizeError(
            f"{survey.identity.name}: no tensor is recognised as the weight of a linear layer, so nothing becomes int8",
            hint=f"What its matrices are: {found}." if found else "It holds no matrices.",
        )


def describe(source: Source, survey: Survey, settings: Settings) -> Conversion:
    """The description of a conversion that the records store: what determines its bytes, and every file it writes."""
    shards = tuple(
        ShardSource(
            contents.file_name,
            contents.file_bytes,
            fingerprint(source, contents.file_name),
            survey.outputs[contents.file_name].file_name,
        )
        for contents in survey.shards
    )
    files = [shard.output for shard in shards]
    files += [sidecar.file_name for sidecar in survey.sidecars.values()]
    files += [*survey.weights.copied, CARD_FILE, REPORT_FILE]
    files += [CONFIG_FILE] if survey.has_config else []
    files += [INDEX_FILE] if len(shards) > 1 else []
    files += [MANIFEST_FILE]
    return Conversion(survey.identity, settings, survey.plan_digest, shards, tuple(files))


def task_of(
    shard: ShardSource, survey: Survey, settings: Settings, options: ConversionRun, store: RecordStore
) -> ShardTask:
    """The task of converting a shard into the directory of `store`, without its stored columns."""
    via_half = settings.float32 == VIA_FLOAT16
    keep_non_finite = options.on_nonfinite == "keep"
    return ShardTask(
        source=shard,
        weight_format=survey.weights.format,
        planned=survey.planned(shard.file),
        directory=options.output,
        partial=store.unfinished.partial_directory / shard.output,
        options=PassOptions(options.threads, options.device, via_half, keep_non_finite, settings.figures),
    )


def executor_for(options: ConversionRun, shards: int, lock: int, progress: Progress) -> Executor:
    """Where tasks for so many shards run. `lock` is the directory's: workers keep it."""
    on_bytes = partial(advance, progress)
    if options.workers > 1 and shards:
        return ProcessExecutor(min(options.workers, shards), lock, on_bytes, WORKER_PRELOAD)
    return InlineExecutor(on_bytes)


def copy_files(source: Source, survey: Survey, output: Path, aside: Path | None = None) -> None:
    """Copy the files that an output has unchanged: the tokenizer and others. `aside` as in `write_file`."""
    for file_name in survey.weights.copied:
        _copy_file(source, file_name, output, aside)
    if source.keeps_in is not None:
        _cache_config_and_index(source, survey)


def _copy_file(source: Source, file_name: str, output: Path, aside: Path | None) -> None:
    with source.fetch(file_name) as local:
        sha256 = copy_file(local.path, output / file_name, below=output, aside=aside)
    try:
        require_published(file_name, local, sha256)
    except DigestMismatchError:
        remove_files(output, [file_name])
        raise


def _cache_config_and_index(source: Source, survey: Survey) -> None:
    """Fetch the files that are read but not copied. Without them, the shards in the cache cannot be used offline."""
    for file_name in (CONFIG_FILE if survey.has_config else None, survey.weights.index_file):
        if file_name is not None:
            with source.fetch(file_name):
                pass
