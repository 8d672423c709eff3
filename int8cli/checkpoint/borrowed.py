"""Scales that lie in another file than the tensor that needs them.

Owns their reading, before a shard is converted or opened. Only their bytes are read of the other file: from the Hub, by
range.
"""

from collections.abc import Mapping
from dataclasses import replace

from int8cli.checkpoint.source import Source
from int8cli.checkpoint.tensor import ShardContents, StoredTensor
from int8cli.errors import CorruptShardError


def with_borrowed(source: Source, contents: ShardContents) -> ShardContents:
    """The same shard with the scales that it needs from other files. Raises the errors of opening and reading these."""
    apart: dict[str, dict[str, StoredTensor]] = {}
    for stored in contents.tensors:
        scaled = stored.scaled
        if scaled is not None and scaled.scales_file != contents.file_name:
            apart.setdefault(scaled.scales_file, {})[scaled.scales.spec.name] = scaled.scales
    if not apart:
        return contents
    borrowed: dict[str, bytes] = {}
    for file_name, scales in apart.items():
        borrowed.update(_read(source, file_name, scales))
    return replace(contents, borrowed=borrowed)


def _read(source: Source, file_name: str, scales: Mapping[str, StoredTensor]) -> dict[str, bytes]:
    found = {}
    with source.open(file_name) as file:
        for name, stored in sorted(scales.items(), key=lambda item: item[1].offset_bytes):
            file.seek(stored.offset_bytes)
            found[name] = file.read(stored.file_nbytes)
            if len(found[name]) != stored.file_nbytes:
                raise CorruptShardError(
                    f"{file_name}: ends before the data of {name}", hint="Download the file again, then run again."
                )
    return found
