"""Converts a checkpoint: all of its shards, then the files that describe the whole.

Owns the order of the work and what makes it resumable: a shard that stands under its name is recorded, and only then is
its source let go. Prints nothing; reports to a Progress.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from int8cli.checkpoint.config_file import CONFIG_FILE
from int8cli.checkpoint.digest import require_published
from int8cli.checkpoint.lock import locked
from int8cli.checkpoint.output_names import remove_files
from int8cli.checkpoint.source import Source
from int8cli.checkpoint.writer import copy_file
from int8cli.conversion import WORKER_PRELOAD
from int8cli.conversion.announce import TASK, advance, begin_conversion
from int8cli.conversion.column_source import ColumnSource, NoColumns
from int8cli.conversion.finish import RenderCard, write_conclusion
from int8cli.conversion.shard_loop import ShardLoop
from int8cli.conversion.task import PassOptions, ShardTask
from int8cli.errors import (
    CANNOT_CALIBRATE,
    DigestMismatchError,
    DiskSpaceError,
    NothingToQuantizeError,
)
from int8cli.planning.output_files import CARD_FILE, INDEX_FILE, REPORT_FILE
from int8cli.planning.survey import Survey, fingerprint, room_needed
from int8cli.progress import Progress
from int8cli.records.manifest import MANIFEST_FILE
from int8cli.records.store import VIA_FLOAT16, Conversion, RecordStore, Settings, ShardSource
from int8cli.results.conversion import ConversionReport
from int8cli.results.units import human_bytes
from int8cli.workers.processes import Executor, InlineExecutor, ProcessExecutor


@dataclass(frozen=True, slots=True)
class ConversionRun:
    """How to convert, besides the settings that decide the result.

    `workers` processes convert side by side, each with `threads` threads. `overwrite` starts over in a directory that
    holds an earlier conversion.
    """

    output: Path
    on_nonfinite: Literal["error", "keep"] = "error"
    overwrite: bool = False
    workers: int = 1
    threads: int = 2
    device: str = "cpu"


def convert(
    source: Source,
    survey: Survey,
    settings: Settings,
    options: ConversionRun,
    render_card: RenderCard,
    progress: Progress,
    columns: ColumnSource | None = None,
) -> ConversionReport:
    """Convert what `survey` found in `source` into `options.output`, going on where an earlier run stopped.

    `columns` tells what to store in sidecars, where the survey has any. `render_card` makes the output's README.md
    from the report. Raises Int8cliError; whatever is raised, no file stands half-written under a final name, and the
    same call resumes from there.
    """
    _require_layers(survey, settings)
    store = RecordStore(options.output)
    with locked(options.output, store.own) as lock:
        store.refuse_links()
        if options.overwrite:
            store.clear()
        conversion = describe(source, survey, settings)
        store.check(conversion)
        records = {shard.file: record for shard in conversion.shards if (record := store.finished(shard))}
        remaining = [shard for shard in conversion.shards if shard.file not in records]
        _require_room(source, survey, options.output, remaining)
        store.claim(conversion)
        store.remove_partial_files()
        begin_conversion(progress, survey, records)
        for file_name in survey.weights.copied:
            _copy_file(source, file_name, options.output)
        if source.keeps_in is not None:
            _keep_what_leads_to_the_weights(source, survey)
        executor = _executor(options, len(remaining), lock, progress)
        try:
            tasks = [_task(shard, survey, settings, options, store) for shard in remaining]
            loop = ShardLoop(source, tasks, executor, store, progress, columns or NoColumns())
            records.update(loop.run(partial(_require_room, source, survey, options.output, remaining)))
        except CANNOT_CALIBRATE:
            if not any(map(store.finished, conversion.shards)):  # the directory is free for another way to do it
                store.clear()
            raise
        finally:
            executor.close()
            store.remove_partial_files()  # an interrupt may have come before any clean-up
        progress.done(TASK)
        in_order = [records[shard.file] for shard in conversion.shards]
        report = write_conclusion(survey, conversion, in_order, options.output, render_card)
        # What a killed run fetched and a later one had no use for would otherwise stay for good.
        store.remove_state()
        return report


def _require_layers(survey: Survey, settings: Settings) -> None:
    """Raise NothingToQuantizeError where the patterns leave nothing, or no matrix is known for a linear layer's.

    The output would be a copy of something that was not understood, under the name of int8.
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
    """The conversion as the records hold it: what decides its bytes, and every file that it will write."""
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


def _task(
    shard: ShardSource, survey: Survey, settings: Settings, options: ConversionRun, store: RecordStore
) -> ShardTask:
    via_half = settings.float32 == VIA_FLOAT16
    keep_non_finite = options.on_nonfinite == "keep"
    return ShardTask(
        source=shard,
        weight_format=survey.weights.format,
        planned=survey.planned(shard.file),
        directory=options.output,
        partial=store.partial_directory / shard.output,
        options=PassOptions(options.threads, options.device, via_half, keep_non_finite, settings.figures),
    )


def _executor(options: ConversionRun, shards: int, lock: int, progress: Progress) -> Executor:
    on_bytes = partial(advance, progress)
    if options.workers > 1 and shards:
        return ProcessExecutor(min(options.workers, shards), lock, on_bytes, WORKER_PRELOAD)
    return InlineExecutor(on_bytes)


def _require_room(
    source: Source, survey: Survey, output: Path, remaining: list[ShardSource], peak_shard_bytes: int | None = None
) -> None:
    """Raises DiskSpaceError, before the first byte, if the remaining output and the shards in flight do not fit.

    `peak_shard_bytes`: the size of the shards in flight, if more than the usual two.
    """
    for room in room_needed(source, survey, [shard.file for shard in remaining], output, peak_shard_bytes):
        if room.needed_bytes > room.free_bytes:
            raise DiskSpaceError(
                f"{room.directory} needs {human_bytes(room.needed_bytes)}, {human_bytes(room.free_bytes)} free",
                hint="Free some space, or choose a directory on another disk.",
            )


def _copy_file(source: Source, file_name: str, output: Path) -> None:
    with source.fetch(file_name) as local:
        sha256 = copy_file(local.path, output / file_name, below=output)
    try:
        require_published(file_name, local, sha256)
    except DigestMismatchError:
        remove_files(output, [file_name])
        raise


def _keep_what_leads_to_the_weights(source: Source, survey: Survey) -> None:
    """Fetch the files that were only read, not copied: without them nobody finds the kept shards offline."""
    for file_name in (CONFIG_FILE if survey.has_config else None, survey.weights.index_file):
        if file_name is not None:
            with source.fetch(file_name):
                pass
