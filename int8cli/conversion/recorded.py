"""Whether the files of a conversion are those of its records, as far as their headers say. Reads no weights."""

from collections.abc import Iterable, Sequence

from int8cli.checkpoint.tensor import QUANTIZABLE_DTYPES, ShardContents
from int8cli.errors import CheckpointError
from int8cli.records.shard_record import FileRecord, ShardRecord
from int8cli.runtime.converted import Converted

_HINT = "The directory is damaged or was edited: convert the model again."


def require_as_recorded(records: Sequence[ShardRecord], converted: Converted) -> None:
    """Raise CheckpointError unless the records name every shard and every tensor, and no others.

    Sidecars without a record are allowed; those with one must be there.
    """
    files = [file for record in records for file in record.files]
    recorded = {file.file: file for file in files}
    shards = {contents.file_name for contents in converted.shards}
    found = {contents.file_name: contents for contents in (*converted.headers, *converted.sidecars)}
    for name in sorted(shards - {record.source.output for record in records}):
        raise CheckpointError(f"{name} has no record", hint=_HINT)
    for name in sorted(recorded.keys() - found.keys()):
        raise CheckpointError(f"{name} has a record, but is missing", hint=_HINT)
    if len(recorded) != len(files) or any(record.files[0].file != record.source.output for record in records):
        raise CheckpointError("two records name one file, or a record names that of another shard", hint=_HINT)
    for name, file in recorded.items():
        if _recorded(file) != _in_header(found[name]):
            raise CheckpointError(f"{name}: its header and its record name different tensors", hint=_HINT)
    _require_same_tensors(records, converted)


def _require_same_tensors(records: Sequence[ShardRecord], converted: Converted) -> None:
    places = {tensor.spec.name: contents.file_name for contents in converted.shards for tensor in contents.tensors}
    specs = {spec.name: (spec, record.source.output) for record in records for spec in record.source_tensors}
    if sum(len(record.source_tensors) for record in records) != len(specs):
        raise CheckpointError("the records name a tensor twice", hint=_HINT)
    for name in _in_one_only(specs, converted.specs):
        raise CheckpointError(f"{name} is only in the records, or only in the files", hint=_HINT)
    for name, (spec, file) in specs.items():
        if places[name] != file:
            raise CheckpointError(f"{name} is in {places[name]}; its record is that of {file}", hint=_HINT)
        if name in converted.scales and spec.dtype not in QUANTIZABLE_DTYPES:
            raise CheckpointError(f"{name} is int8, and {spec.dtype} in its record", hint=_HINT)


def _in_one_only(one: Iterable[str], other: Iterable[str]) -> list[str]:
    return sorted(set(one) ^ set(other))


def _recorded(file: FileRecord) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in file.tensors}


def _in_header(contents: ShardContents) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {tensor.spec.name: (tensor.spec.dtype, tensor.spec.shape) for tensor in contents.tensors}
