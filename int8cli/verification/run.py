"""All checks of an output, in order: it is complete, it loads, and it matches its source.

Owns that order. Writes nothing and prints nothing; reports to a Progress. Imports torch only to compare with a source.
The loader is imported in its own process, in parallel with the other checks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from int8cli.checkpoint.config_file import CONFIG_FILE
from int8cli.checkpoint.lock import refuse_while_locked
from int8cli.checkpoint.output_names import OWN_DIRECTORY
from int8cli.checkpoint.source import Source
from int8cli.errors import Int8cliError, OutputError
from int8cli.progress import Progress
from int8cli.records.conversion import Conversion
from int8cli.records.manifest import MANIFEST_FILE, SideFile, read_manifest
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore
from int8cli.results.units import counted
from int8cli.results.verification import Check, Failure, Verification
from int8cli.verification.beside import check_loads_beside
from int8cli.verification.consistency import (
    config_failures,
    index_failures,
    record_failures,
    report_failures,
    side_file_failures,
    tensor_failures,
)
from int8cli.verification.files import READ, DigestPass
from int8cli.verification.heads import heads_by_shape
from int8cli.verification.layout import target_of
from int8cli.verification.loads import NAME
from int8cli.verification.options import VerificationRun
from int8cli.verification.sidecars import check_sidecars
from int8cli.workers.torch_start import start_torch_unless_started


def conversion_in(directory: Path, *, weights: bool = True) -> Conversion:
    """The finished conversion in a directory. Raises OutputError if there is none, and says what is missing.

    With `weights`, raises ShardsRemovedError if shards were uploaded and are not here any more.
    """
    store = RecordStore(directory)
    conversion = store.require_conversion()
    in_use = f"{directory} is being written by int8cli convert"
    refuse_while_locked(directory / OWN_DIRECTORY, in_use, "Wait for it to end.")
    target_of(conversion)
    if read_manifest(directory) is None:
        raise OutputError(
            f"{directory}: the conversion is not finished: {_what_is_missing(store, conversion)}",
            hint="Run the same convert command again: it resumes where it stopped.",
        )
    if weights and store.has_uploads(conversion):  # a damaged record is otherwise for the checks to report
        store.refuse_removed(conversion)
    return conversion


def verify(directory: Path, source: Source | None, options: VerificationRun, progress: Progress) -> Verification:
    """Run all checks that are possible. Raises OutputError for a directory without a finished conversion.

    With a source, its shards are fetched one at a time, converted again and compared.
    """
    conversion = conversion_in(directory)
    records, unreadable = _read_records(RecordStore(directory), conversion)
    manifest = read_manifest(directory) or ()
    with _loads_beside(directory, conversion, records) as loads:
        whole = list(_check_whole(directory, conversion, records, unreadable, manifest, options, progress))
        against: list[Check] = []
        if source is not None:
            against += _check_against(source, directory, conversion, records, options, progress)
        checks = (*whole, loads(), *against)
    name = source.identity.name if source is not None else None
    return Verification(str(directory), conversion.source.name, conversion.settings.layout, name, checks)


@contextmanager
def _loads_beside(
    directory: Path, conversion: Conversion, records: Mapping[str, ShardRecord]
) -> Iterator[Callable[[], Check]]:
    """Run the check "loads" in parallel with the body of this context. Yields a function that waits for its result."""
    if CONFIG_FILE not in conversion.files:
        yield lambda: Check.not_made(NAME, "the source had no config.json")
        return
    with check_loads_beside(directory, conversion.settings.layout, list(records.values())) as loads:
        yield loads


def _check_whole(
    directory: Path,
    conversion: Conversion,
    records: Mapping[str, ShardRecord],
    unreadable: list[Failure],
    manifest: tuple[SideFile, ...],
    options: VerificationRun,
    progress: Progress,
) -> Iterator[Check]:
    found = list(records.values())
    shards = len(conversion.shards)
    named = {failure.file for failure in unreadable}
    failures = unreadable + [each for each in record_failures(conversion, records) if each.file not in named]
    yield Check.of("records", f"{len(found)} of {shards}", failures)
    files = [file for record in found for file in record.files]
    size_bytes, tensors = sum(file.size_bytes for file in files), sum(len(file.tensors) for file in files)
    progress.begin(READ, {file.file: file.size_bytes - file.header_bytes for file in files})
    failures = DigestPass(directory, files, options.threads, progress).run()
    progress.done(READ)
    detail = f"{_files(len(found), len(files) - len(found))}, {size_bytes:,} bytes, {tensors:,} tensors by digest"
    yield Check.of("shards", detail, failures)
    yield check_sidecars(directory, conversion, found)
    sources = sum(len(record.source_tensors) for record in found)
    detail = f"{sources:,} of the source: none missing, none extra"
    heads = heads_by_shape(directory, found) if CONFIG_FILE in conversion.files else ()
    yield Check.of("tensors", detail, (*tensor_failures(conversion, found), *heads))
    detail = "every tensor, and total_size" if shards > 1 else "not needed for a single shard"
    yield Check.of("index", detail, index_failures(directory, found))
    if CONFIG_FILE in conversion.files:
        detail = "quantization_config matches the settings"
        yield Check.of("config", detail, config_failures(directory, conversion, found))
    figures = "figures" if conversion.settings.figures else "sizes; no errors were measured"
    detail = f"source, settings, totals, {figures}"
    yield Check.of("report", detail, report_failures(directory, conversion, found))
    detail = f"{counted(len(manifest), 'other file')}, by digest; no extra weights"
    yield Check.of("files", detail, side_file_failures(directory, conversion, manifest))


def _files(shards: int, sidecars: int) -> str:
    files = f"{shards:,} file" + ("s" if shards != 1 else "")
    return f"{files} and {sidecars:,} with stored columns" if sidecars else files


def _check_against(
    source: Source,
    directory: Path,
    conversion: Conversion,
    records: Mapping[str, ShardRecord],
    options: VerificationRun,
    progress: Progress,
) -> Iterator[Check]:
    start_torch_unless_started()
    from int8cli.verification.against_source import COMPARE, check_copies, check_source, check_weights, survey_for

    survey = survey_for(source, conversion)
    yield check_source(source, survey, conversion)
    sizes = {contents.file_name: sum(t.file_nbytes for t in contents.tensors) for contents in survey.shards}
    progress.begin(COMPARE, {s.output: sizes[s.file] for s in conversion.shards if s.file in sizes})
    yield from check_weights(directory, source, survey, conversion, records, options, progress)
    progress.done(COMPARE)
    yield check_copies(directory, source, survey)


def _read_records(store: RecordStore, conversion: Conversion) -> tuple[dict[str, ShardRecord], list[Failure]]:
    """The records by source shard, and a failure for each record that cannot be read."""
    records: dict[str, ShardRecord] = {}
    failures = []
    for shard in conversion.shards:
        try:
            record = store.record(shard)
        except Int8cliError as error:
            failures.append(Failure(shard.output, str(error)))
            continue
        if record is not None:
            records[shard.file] = record
    return records, failures


def _what_is_missing(store: RecordStore, conversion: Conversion) -> str:
    missing = [shard.output for shard in conversion.shards if store.finished(shard) is None]
    if not missing:
        return f"{MANIFEST_FILE} is missing"
    return f"{len(missing)} of {len(conversion.shards)} shards are missing: {', '.join(missing)}"
