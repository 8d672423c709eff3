"""Checks that the sidecars match the records about stored columns, and that there are no extra sidecars.

Owns the checks that are specific to sidecars. The digests of their bytes are checked with those of all other files.
Reads only indices.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path

from int8cli.checkpoint.reader import FileReader
from int8cli.checkpoint.tensor import ShardContents, TensorSpec
from int8cli.conversion.resumed_smoothing import exponents_in
from int8cli.errors import Int8cliError
from int8cli.planning.exponents import TensorExponents, are_of_rows, is_exponents, misfits, steps_of, tensor_of
from int8cli.planning.output_files import SIDECAR_DIRECTORY, outlier_cols_name, sidecar_file_name, stored_specs
from int8cli.records.conversion import NO_OUTLIERS, NO_SMOOTHING, STEPS, Conversion, budget_bytes
from int8cli.records.shard_record import FileRecord, ShardRecord
from int8cli.results.conversion import LayerReport
from int8cli.results.smoothing import summarize_smoothing
from int8cli.results.verification import Check, Failure

NAME = "sidecars"


def check_sidecars(directory: Path, conversion: Conversion, records: Sequence[ShardRecord]) -> Check:
    """Check that each int8 layer has its entry in the sidecar, with the reported columns in ascending order."""
    failures = list(_stray_files(directory, conversion, records))
    for record in records:
        failures += _record_failures(directory, conversion, record)
    if conversion.settings.outliers == NO_OUTLIERS:
        return Check.of(NAME, "no columns are stored", failures)
    if not failures:
        failures += _misfits(directory, records)
        failures += _budget_failures(conversion, records)
    layers = [layer.stored for record in records for layer in record.layers if layer.stored is not None]
    columns, having = sum(len(stored.columns) for stored in layers), sum(1 for stored in layers if stored.columns)
    detail = f"{columns:,} columns of {having:,} layers, sorted and as reported"
    smoothing = summarize_smoothing(layer.smoothing for record in records for layer in record.layers)
    detail += f"; {smoothing.smoothed:,} layers are smoothed" if smoothing is not None else ""
    return Check.of(NAME, detail, failures)


def _budget_failures(conversion: Conversion, records: Sequence[ShardRecord]) -> Iterator[Failure]:
    """Check that all stored columns together are within the budget, if there is one."""
    share = conversion.settings.outlier_budget
    due = budget_bytes(share, sum(record.files[0].size_bytes for record in records))
    taken = sum(layer.stored.bytes for record in records for layer in record.layers if layer.stored is not None)
    if share and taken > due:
        yield Failure(SIDECAR_DIRECTORY, f"has {taken:,} bytes of stored columns; the settings allow {due:,}")


def _misfits(directory: Path, records: Sequence[ShardRecord]) -> Iterator[Failure]:
    """The smoothed layers whose columns do not fit what is divided in front of them."""
    files = {f"{layer.name}.weight": record.source.output for record in records for layer in record.layers}
    layers = {f"{layer.name}.weight": layer.smoothing for record in records for layer in record.layers}
    smoothed = {name: layer for name, layer in layers.items() if layer is not None and layer.smoothed}
    sidecars = {file.file for record in records for file in record.files[1:]}
    found: dict[str, TensorExponents] = {}
    for name in sorted(sidecars) if smoothed else ():
        try:
            found |= exponents_in(directory / name)
        except (OSError, Int8cliError) as error:
            yield Failure(name, str(error))
            return
    for weight in misfits(smoothed, found):
        yield Failure(sidecar_file_name(files[weight]), "is not multiplied by what its input is divided by", weight)


def recorded_exponents(sidecar: Path, contents: ShardContents) -> dict[str, TensorExponents]:
    """The exponents of the shard's tensors. Nothing if they cannot be read, which the checks of the files report."""
    try:
        found = exponents_in(sidecar)
    except (OSError, Int8cliError):
        return {}
    known = {stored.spec.name for stored in contents.tensors}
    return {name: each for name, each in found.items() if name in known}


def column_problem(layer: LayerReport, most: int | None) -> str | None:
    """What is wrong with the reported columns of a layer, at most `most` if that is a number; None if nothing is."""
    if layer.stored is None:
        return "has no entry for stored columns in the report"
    indices = list(layer.stored.indices)
    if any(earlier >= later for earlier, later in pairwise(indices)):
        return f"its stored columns {indices} are not in ascending order"
    if indices and not 0 <= indices[0] <= indices[-1] < layer.shape[1]:
        return f"its stored columns {indices} include some outside its {layer.shape[1]:,}"
    if most is not None and len(indices) > most:
        return f"has {len(indices):,} stored columns; the settings allow {most:,}"
    return None


def _stray_files(directory: Path, conversion: Conversion, records: Sequence[ShardRecord]) -> Iterator[Failure]:
    known = {file.file for record in records for file in record.files[1:]}
    for path in sorted((directory / SIDECAR_DIRECTORY).rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name not in known and not path.is_dir():
            yield Failure(name, "has no record: it does not belong to this conversion")
    for name in sorted(known - set(conversion.files)):
        yield Failure(name, "has a record, but is not a file of this conversion")


def _record_failures(directory: Path, conversion: Conversion, record: ShardRecord) -> Iterator[Failure]:
    """Check that the sidecar of one record exists and matches the record."""
    name = sidecar_file_name(record.source.output)
    due = conversion.settings.outliers != NO_OUTLIERS and bool(record.layers)
    smooth = conversion.settings.smooth
    smoothed = smooth != NO_SMOOTHING
    sidecars = [file for file in record.files[1:] if file.file == name]
    for other in record.files[1:]:
        if other.file != name:
            yield Failure(other.file, f"is in the record of {record.source.output}, which has no such file")
    if not due and not (smoothed and sidecars):
        if sidecars:
            yield Failure(name, "has a record, but this conversion stores no columns")
        return
    if not sidecars:
        yield Failure(name, f"is missing from the record of {record.source.output}")
        return
    yield from _tensor_failures(record, sidecars[0], smooth)
    problems = [(layer, column_problem(layer, conversion.settings.most_columns)) for layer in record.layers]
    yield from (Failure(name, problem, layer.name) for layer, problem in problems if problem is not None)
    sound = [layer for layer, problem in problems if problem is None]
    yield from _index_failures(directory, sidecars[0], sound)


def _tensor_failures(record: ShardRecord, sidecar: FileRecord, smooth: str) -> Iterator[Failure]:
    """Check that the recorded tensors are those of the layers, by name, shape and dtype: none missing, none extra."""
    sources = {spec.name: spec for spec in record.source_tensors}
    unmatched = {tensor.name: tensor for tensor in sidecar.tensors}
    for layer in record.layers:
        source = sources.get(f"{layer.name}.weight")
        if source is None or layer.stored is None:
            continue  # reported by another check
        due = stored_specs(layer.name, source.dtype, layer.shape[0], len(layer.stored.columns))
        for spec in due:
            tensor = unmatched.pop(spec.name, None)
            if tensor is None:
                yield Failure(sidecar.file, "is missing", spec.name)
            elif (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape):
                was = f"is {tensor.dtype} {list(tensor.shape)}, not {spec.dtype} {list(spec.shape)}"
                yield Failure(sidecar.file, was, spec.name)
        size_bytes = sum(spec.nbytes for spec in due)
        if layer.stored.bytes != size_bytes:
            problem = f"its stored columns are reported as {layer.stored.bytes:,} bytes, but have {size_bytes:,}"
            yield Failure(sidecar.file, problem, layer.name)
    for name, tensor in unmatched.items():
        if not is_exponents(name) or STEPS.get(smooth) != steps_of(name):
            yield Failure(sidecar.file, "does not belong to an int8 layer", name)
        elif (tensor.dtype, tensor.shape) != ("I8", _due_exponents(name, record)):
            yield Failure(sidecar.file, f"is {tensor.dtype} {list(tensor.shape)}, which fits no tensor", name)


def _due_exponents(name: str, record: ShardRecord) -> tuple[int, ...] | None:
    """The shape of exponents, from the tensor that they belong to; None if the shard has no such tensor."""
    tensor = tensor_of(name)
    layer = next((each for each in record.layers if f"{each.name}.weight" == tensor), None)
    if layer is not None:
        return (layer.shape[0] if are_of_rows(name) else layer.shape[1],)
    source = next((spec for spec in record.source_tensors if spec.name == tensor), None)
    return source.shape if source is not None and are_of_rows(name) else None


def _index_failures(directory: Path, sidecar: FileRecord, layers: Sequence[LayerReport]) -> Iterator[Failure]:
    """Check that the indices in the file are the reported ones. The digest check reports a missing or resized file."""
    path = directory / sidecar.file
    if not path.is_file() or path.stat().st_size != sidecar.size_bytes:
        return
    try:
        with closing(FileReader(path)) as reader:
            found = dict(_indices(reader, sidecar))
    except Int8cliError as error:
        yield Failure(sidecar.file, str(error))
        return
    for layer in layers:
        name = outlier_cols_name(layer.name)
        reported = layer.stored.indices if layer.stored is not None else ()
        if name in found and found[name] != reported:
            yield Failure(sidecar.file, f"is {list(found[name])}, reported as {list(reported)}", name)


def _indices(reader: FileReader, sidecar: FileRecord) -> Iterator[tuple[str, tuple[int, ...]]]:
    offset_bytes = sidecar.header_bytes
    for tensor in sidecar.tensors:
        size_bytes = TensorSpec(tensor.name, tensor.dtype, tensor.shape).nbytes
        if tensor.dtype == "I32":
            data = memoryview(bytearray(size_bytes))
            reader.read_into(offset_bytes, data)
            yield tensor.name, struct.unpack(f"<{size_bytes // 4}i", data)
        offset_bytes += size_bytes
