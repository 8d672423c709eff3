"""Verify a conversion: it is complete, it loads and, if a source is given, it matches the source."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from int8cli.checkpoint.disk import system_errors
from int8cli.checkpoint.locate import opened_source
from int8cli.checkpoint.own_files import remove_tree
from int8cli.checkpoint.reader import size_of
from int8cli.checkpoint.source import Source
from int8cli.commands.checks import check_device, check_verify
from int8cli.commands.first_words import announce_duration
from int8cli.commands.options import VerifyOptions
from int8cli.commands.ways import speed_without_torch
from int8cli.estimate.ways import conversion_s, reading_s
from int8cli.machine.speed import usable_cores
from int8cli.planning.blocks import THREADS_FOR_A_SHARD
from int8cli.progress import SILENT, Progress
from int8cli.records.conversion import Conversion
from int8cli.records.store import RecordStore
from int8cli.results.units import human_bytes
from int8cli.results.verification import Verification
from int8cli.verification import VerificationRun, conversion_in
from int8cli.verification import verify as make_checks
from int8cli.workers.torch_start import torch_threads_restored

_DEFAULTS = VerifyOptions()
_NOT_WORTH_MEASURING_BYTES = 500_000_000  # converted in a few seconds: less than measuring the machine may take


@system_errors()
def verify(directory: str | Path, options: VerifyOptions = _DEFAULTS, *, progress: Progress = SILENT) -> Verification:
    """Check that a directory written by `convert` is complete and loads. The verdict is `passed` of the result.

    Compares every byte of every file with the digests taken when it was written. With a `source`, fetches its shards
    one at a time, converts them again and compares. Raises OutputError for a directory without a finished conversion,
    and the errors of opening the source. A failed check does not raise; it is part of the result.
    """
    check_verify(options)
    check_device(options.device)
    directory = Path(directory)
    conversion = conversion_in(directory)
    run = VerificationRun(options.threads or min(THREADS_FOR_A_SHARD, usable_cores()), options.device)
    with torch_threads_restored(), _source(directory, conversion, options, progress) as source:
        _announce(directory, conversion, source, progress)
        return make_checks(directory, source, run, progress)


def _announce(directory: Path, conversion: Conversion, source: Source | None, progress: Progress) -> None:
    """Say how long it takes to read the output and, if there is a source, to convert it again."""
    output_bytes = sum(size_of(directory / name) for name in conversion.files if (directory / name).is_file())
    doing, seconds = f"reading {human_bytes(output_bytes)}", reading_s(output_bytes)
    if source is not None:
        source_bytes = sum(shard.size_bytes for shard in conversion.shards)
        if source_bytes < _NOT_WORTH_MEASURING_BYTES:
            return
        doing += f" and converting {human_bytes(source_bytes)} again"
        if source.identity.on_hub:
            doing += ", without the download"
        speed = speed_without_torch(progress)
        if speed is None:
            return
        seconds += conversion_s(source_bytes, speed)
    announce_duration(doing, seconds, progress)


@contextmanager
def _source(
    directory: Path, conversion: Conversion, options: VerifyOptions, progress: Progress
) -> Iterator[Source | None]:
    """The source to compare with, if there is one; by default at the revision that was converted.

    Its shards are downloaded to the same directory as in a conversion, one at a time, and removed afterwards.
    """
    if options.source is None:
        yield None
        return
    model, revision, converted = str(options.source), options.revision, conversion.source
    if revision is None and converted.on_hub and converted.name == model:
        revision = converted.revision
    incoming = RecordStore(directory).unfinished.incoming_directory
    try:
        with opened_source(
            model, revision=revision, download_dir=incoming, retry_for_s=options.retry_for, progress=progress
        ) as source:
            yield source
    finally:
        remove_tree(incoming, directory)
