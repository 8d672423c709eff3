"""Checks that a conversion matches its source: every shard is converted again, and compared instead of written.

Owns what is compared and what a difference means. `recorded_task` says how a shard was converted, `conversion` converts
it, `comparison` compares bytes.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from int8cli.checkpoint.digest import NOT_AS_PUBLISHED
from int8cli.checkpoint.output_names import CONVERSION_FILE
from int8cli.checkpoint.source import LocalFile, Source
from int8cli.conversion.open_shard import open_shard
from int8cli.conversion.pass_ledger import PassResult
from int8cli.conversion.shard import layer_report
from int8cli.conversion.task import ShardTask
from int8cli.errors import Int8cliError
from int8cli.llm_int8.metrics import ErrorSums
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.planned_shard import PlannedShard
from int8cli.planning.survey import Survey, fingerprint, survey_source
from int8cli.progress import Progress
from int8cli.records.conversion import EXACT_SMOOTHING, Conversion
from int8cli.records.manifest import SideFile
from int8cli.records.shard_record import ShardRecord
from int8cli.results.units import counted
from int8cli.results.verification import Check, Failure
from int8cli.verification.comparison import Comparison
from int8cli.verification.layout import target_of
from int8cli.verification.nearest import not_nearest, rounded_vectors
from int8cli.verification.options import VerificationRun
from int8cli.verification.recorded_task import task_as_recorded
from int8cli.verification.second_opinion import Opinion, SecondOpinion

# Two machines may add the same float64 values in different orders.
_SUMS_RELATIVE_TOLERANCE = 1e-6

COMPARE = "compare"


def survey_for(source: Source, conversion: Conversion) -> Survey:
    """The source in its current state, planned with the settings of the conversion."""
    settings = conversion.settings
    return survey_source(source, PlanOptions(settings.skip, settings.only), target_of(conversion))


def check_source(source: Source, survey: Survey, conversion: Conversion) -> Check:
    """Check that this is the source that was converted: by names and sizes, and in a directory by fingerprints."""
    found = {
        contents.file_name: (contents.file_bytes, fingerprint(source, contents.file_name)) for contents in survey.shards
    }
    failures = []
    if source.identity.on_hub and conversion.source.on_hub and source.identity != conversion.source:
        was, now = (f"{each.name} at {each.revision}" for each in (conversion.source, source.identity))
        failures.append(Failure(CONVERSION_FILE, f"was made from {was}; this is {now}"))
    for shard in conversion.shards:
        size_bytes, mark = found.pop(shard.file, (None, ""))
        if size_bytes is None:
            failures.append(Failure(shard.file, "is missing from the source"))
        elif size_bytes != shard.size_bytes:
            failures.append(Failure(shard.file, f"has {size_bytes:,} bytes in the source; it had {shard.size_bytes:,}"))
        elif source.identity.on_hub == conversion.source.on_hub and mark != shard.fingerprint:
            failures.append(Failure(shard.file, "is not the file that was converted"))
    failures += [Failure(name, "exists in the source but was not converted") for name in found]
    return Check.of("source", f"{source.identity.name}: {counted(len(conversion.shards), 'shard')}", failures)


def check_weights(
    directory: Path,
    source: Source,
    survey: Survey,
    conversion: Conversion,
    records: Mapping[str, ShardRecord],
    options: VerificationRun,
    progress: Progress,
) -> tuple[Check, Check, Check]:
    """Convert every shard again and compare bytes and figures, and hear a second opinion on what agrees.

    Fetches one shard at a time from the Hub.
    """
    weights: list[Failure] = []
    figures: list[Failure] = []
    layers = copied = columns = scaled = rounded = 0
    present = {contents.file_name: contents.file_bytes for contents in survey.shards}
    # One of another size is another file, as the check of the source says: nothing can be learnt from its bytes.
    alike = [shard for shard in conversion.shards if present.get(shard.file) == shard.size_bytes]
    if conversion.shards and not alike:
        why = "no shard of this source is one that was converted"
        return Check.not_made("weights", why), Check.not_made("method", why), Check.not_made("figures", why)
    shards = [shard for shard in alike if shard.file in records]
    judge, opinion = SecondOpinion(directory, conversion, records.values(), survey.config), Opinion()
    for shard, following in zip_longest(shards, shards[1:]):
        record = records[shard.file]
        task = task_as_recorded(directory, shard, survey, conversion, record, options)
        layers, copied = layers + len(record.layers), copied + len(task.planned.plan.copied)
        columns += sum(len(stored.columns) for stored in task.stored.values())
        scaled += len(task.planned.exponents)
        rounded += len(rounded_vectors(task.planned))
        try:
            with source.fetch(shard.file) as local:
                if following is not None:
                    source.prefetch(following.file)
                result, found = _compare(task.with_borrowed(source), local, record, judge, opinion, progress)
        except Int8cliError as error:
            weights.append(Failure(shard.output, str(error)))
            continue
        progress.done(COMPARE, shard.output)
        weights += found
        figures += _figure_failures(task, result, record)
    detail = f"{layers:,} layers quantized again, {copied:,} tensors compared as they are"
    detail += f", {columns:,} stored columns too" if columns else ""
    exact = conversion.settings.smooth == EXACT_SMOOTHING
    by = "powers of two" if exact else "scales"
    detail += f"; {scaled:,} tensors are those of the source times their {by}" if scaled else ""
    detail += f", of which {rounded:,} stay floats, each value the nearest" if rounded else ""
    method = f"{opinion.layers:,} layers by its definition, {opinion.copied:,} tensors read a second way"
    return (
        Check.of("weights", detail, weights),
        Check.of("method", method, opinion.failures),
        Check.of("figures", _figures_detail(layers, conversion), figures),
    )


def _figures_detail(layers: int, conversion: Conversion) -> str:
    if conversion.settings.figures:
        return f"of {layers:,} layers, recomputed"
    return f"no errors were measured; shapes and sizes of {layers:,} layers"


def check_copies(directory: Path, source: Source, survey: Survey) -> Check:
    """Check that the copied files equal those of the source, byte for byte."""
    failures = []
    for name in survey.weights.copied:
        try:
            with source.fetch(name) as local:
                if SideFile.of_path(name, local.path) != SideFile.of_path(name, directory / name):
                    failures.append(Failure(name, "differs from the file in the source"))
        except (OSError, Int8cliError) as error:
            failures.append(Failure(name, str(error)))
    return Check.of("copies", counted(len(survey.weights.copied), "copied file"), failures)


def _compare(
    task: ShardTask,
    local: LocalFile,
    record: ShardRecord,
    judge: SecondOpinion,
    opinion: Opinion,
    progress: Progress,
) -> tuple[PassResult, list[Failure]]:
    """Convert a shard again and compare. `judge` adds to `opinion` what it finds in a shard that agrees."""
    planned, failures = _comparable(task)

    def advance(shard: str, tensor: str, count: int) -> None:
        progress.advance(COMPARE, task.source.output, count, tensor)

    with ExitStack() as opened:
        shard = opened.enter_context(open_shard(task, local))
        comparisons = [
            opened.enter_context(closing(Comparison(task.directory / file.file_name, file))) for file in planned.files
        ]
        result = shard.run_pass(planned, task.options, comparisons, advance)
        if result.source_sha256 != local.sha256:
            failures.append(Failure(task.source.file, NOT_AS_PUBLISHED))
        for comparison in comparisons:
            failures += comparison.differences()
        if not failures:
            failures += not_nearest(planned, shard.reader, task.directory / planned.output.file_name)
        if not failures and not result.non_finite:
            opinion.add(judge.of(task, record, shard))
    for name, place in result.non_finite.items():
        failures.append(Failure(task.source.output, f"is in int8, but contains {place.value} in the source", name))
    return result, failures


def _comparable(task: ShardTask) -> tuple[PlannedShard, list[Failure]]:
    """The planned files to compare. If the existing sidecar has the wrong size, leaves it out and adds a failure."""
    sidecar = task.planned.sidecar
    if sidecar is None:
        return task.planned, []
    path = task.directory / sidecar.file_name
    if not path.is_file():
        problem = "is missing"
    elif (found := path.stat().st_size) != sidecar.file_bytes:
        problem = f"has {found:,} bytes; the conversion of the source has {sidecar.file_bytes:,}"
    else:
        return task.planned, []
    return replace(task.planned, sidecar=None, columns={}), [Failure(sidecar.file_name, problem)]


def _figure_failures(task: ShardTask, result: PassResult, record: ShardRecord) -> Iterator[Failure]:
    recorded = {layer.name: layer for layer in record.layers}
    for decision in task.planned.plan.quantized:
        if decision.spec.name in result.non_finite:
            continue
        before = recorded[decision.module]
        recomputed = layer_report(decision, task.planned.target, result, before.stored, before.smoothing)
        if replace(recomputed, sums=before.sums) != before:
            yield Failure(record.files[0].file, "its shape, kind or sizes differ from the report", decision.module)
        if recomputed.sums is None or before.sums is None:
            continue  # not measured; if it should have been, the check of the records reports that
        for name in ErrorSums.__slots__:
            now, was = getattr(recomputed.sums, name), getattr(before.sums, name)
            if not math.isclose(now, was, rel_tol=_SUMS_RELATIVE_TOLERANCE):
                yield Failure(record.files[0].file, f"{name} is {now!r}, the report has {was!r}", decision.module)
