"""The index of a sharded checkpoint: which shard each tensor is in.

Owns the checks of what an index says, before any file that it names is opened.
"""

from typing import Any

from int8cli.checkpoint.file_kinds import SUFFIXES, WeightFormat
from int8cli.checkpoint.source import Source, checked_file_name
from int8cli.errors import IndexFileError
from int8cli.typed_json import InvalidJsonError, parse_json

_LIMIT_BYTES = 100_000_000


def read_index(
    source: Source, index_file: str, weight_format: WeightFormat, files: frozenset[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """The index's weight_map (tensor → shard) and metadata. Every shard that it names is one of `files`.

    Raises IndexFileError for an index that is invalid, or names a file that is missing, forbidden or no weight file.
    """
    index = _parse_index(source, index_file)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        problem = "is missing" if weight_map is None else "does not map tensors to files"
        raise IndexFileError(f"{index_file}: weight_map {problem}")
    if not isinstance(metadata, dict):
        raise IndexFileError(f"{index_file}: metadata is {metadata!r:.80}, not an object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise IndexFileError(f"{index_file}: the tensor {name!r} is mapped to {shard!r:.80}, not to a file name")
    for shard in sorted(set(weight_map.values())):
        _check_shard(shard, index_file, weight_format, files)
    return weight_map, metadata


def _check_shard(shard: str, index_file: str, weight_format: WeightFormat, files: frozenset[str]) -> None:
    """Raise IndexFileError if the index names a file that cannot be a shard of this source."""
    try:
        checked_file_name(shard)
    except IndexFileError as error:
        raise IndexFileError(f"{index_file} names a file outside the checkpoint: {error}", hint=error.hint) from error
    if not shard.endswith(SUFFIXES[weight_format]):
        raise IndexFileError(f"{index_file} names {shard!r}, which is not a {SUFFIXES[weight_format][0]} file")
    if shard not in files:
        raise IndexFileError(
            f"{index_file} names {shard!r}, which is missing",
            hint="Get the missing file, then run the same command again.",
        )


def _parse_index(source: Source, index_file: str) -> dict[str, Any]:
    index = read_small_json(source, index_file)
    if not isinstance(index, dict):
        raise IndexFileError(f"{index_file} is not a JSON object")
    return index


def read_small_json(source: Source, name: str) -> Any:
    """A JSON file of the source. Raises IndexFileError for invalid JSON, or for a file of more than 100 MB."""
    size_bytes = source.size_bytes(name)
    if size_bytes > _LIMIT_BYTES:
        raise IndexFileError(f"{name} has {size_bytes:,} bytes, too large for an index")
    with source.open(name) as file:
        text = file.read(size_bytes)
    try:
        return parse_json(text)
    except InvalidJsonError as error:
        raise IndexFileError(f"{name} {error}") from error
