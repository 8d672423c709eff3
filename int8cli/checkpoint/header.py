"""The safetensors header: read from a file's first bytes, and written for a new file.

Owns the rules of the format (https://github.com/huggingface/safetensors#format) and checks them at least as strictly as
the format's own reader. Reads no tensor's data, and does not know which tensors a model needs.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from int8cli.checkpoint.disk import GET_IT_AGAIN
from int8cli.checkpoint.header_json import (
    ENTRY_FIELDS,
    MOST_TENSORS,
    SURROGATE,
    U64_MAX,
    HeaderEntry,
    are_counts,
    parse_header,
    shown,
)
from int8cli.checkpoint.stand_ins import HEAD_BYTES, refuse_stand_in
from int8cli.checkpoint.tensor import DTYPE_BITS, ShardContents, StoredTensor, TensorSpec
from int8cli.errors import CheckpointError, CorruptShardError

HEADER_LIMIT_BYTES = 100_000_000  # the format's own bound, `MAX_HEADER_SIZE`
METADATA_KEY = "__metadata__"

_LENGTH_BYTES = 8
_LARGEST_EXTENT = 2**63 - 1
# The format's serializer sorts by its dtype enum, which is declared in this order, the widest last.
_DTYPE_ORDER = {dtype: order for order, dtype in enumerate(DTYPE_BITS)}


def read_header(file: BinaryIO, file_name: str, file_bytes: int) -> ShardContents:
    """Read the header of a safetensors file of `file_bytes` bytes: its tensors by offset, absolute in the file.

    Raises CorruptShardError for every violation of the format, naming file, tensor and place, and CheckpointError for
    more than MOST_TENSORS tensors.
    """
    text = _read_text(file, file_name, file_bytes)
    header = parse_header(text, file_name)
    metadata = _checked_metadata(header.pop(METADATA_KEY, {}), file_name)
    data_start = _LENGTH_BYTES + len(text)
    tensors = sorted(
        (_stored_tensor(name, entry, data_start, file_name) for name, entry in header.items()),
        key=lambda tensor: (tensor.offset_bytes, tensor.end_bytes, tensor.spec.name),
    )
    _check_coverage(tensors, data_start, file_name, file_bytes)
    return ShardContents(file_name, tuple(tensors), metadata, file_bytes)


def encode_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, tuple[StoredTensor, ...]]:
    """Lay out the tensors of a new file. Returns the file's first bytes, and the place of each tensor in file order.

    Tensors are sorted by dtype, the widest first, then by name, without gaps. The format's own serializer does the
    same, which aligns every tensor to its width. Names must be unique. Raises CheckpointError for names or sizes that
    the format does not allow.
    """
    ordered = sorted(specs, key=lambda spec: (-_DTYPE_ORDER[spec.dtype], spec.name))
    header: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for spec in ordered:
        if spec.name in header or spec.name == METADATA_KEY or SURROGATE.search(spec.name):
            raise CheckpointError(f"a safetensors file cannot contain a tensor named {spec.name!r}")
        begin, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT_BYTES or len(ordered) > MOST_TENSORS:
        raise CheckpointError(
            f"the header for {len(ordered):,} tensors would have {len(text):,} bytes; the most are "
            f"{HEADER_LIMIT_BYTES:,} bytes and {MOST_TENSORS:,} tensors",
            hint="Split the model into more and smaller shards before converting it.",
        )
    data_start = _LENGTH_BYTES + len(text)
    stored = tuple(StoredTensor(spec, data_start + header[spec.name]["data_offsets"][0]) for spec in ordered)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, stored


def _read_text(file: BinaryIO, file_name: str, file_bytes: int) -> bytes:
    """The header's JSON as bytes. Its length is checked against the file's size before it is read."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    refuse_stand_in(head, file_name)
    if min(len(head), file_bytes) < _LENGTH_BYTES:
        raise CorruptShardError(
            f"{file_name}: the file has {file_bytes:,} bytes, fewer than the {_LENGTH_BYTES} of its length field",
            hint=GET_IT_AGAIN,
        )
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if length > HEADER_LIMIT_BYTES:
        raise CorruptShardError(
            f"{file_name}: the header claims {length:,} bytes, the format allows {HEADER_LIMIT_BYTES:,}",
            hint="It is probably not a safetensors file.",
        )
    if _LENGTH_BYTES + length > file_bytes:
        raise CorruptShardError(
            f"{file_name}: the header claims {length:,} bytes, the file has {file_bytes - _LENGTH_BYTES:,} after its "
            "length field",
            hint=GET_IT_AGAIN,
        )
    file.seek(_LENGTH_BYTES)
    text = file.read(length)
    if len(text) != length:
        raise CorruptShardError(
            f"{file_name}: the file ended {length - len(text):,} bytes before its header did", hint=GET_IT_AGAIN
        )
    return text


def _checked_metadata(metadata: Any, file_name: str) -> dict[str, str]:
    if metadata is None:  # null is the same as no metadata to the reference reader
        return {}
    if not isinstance(metadata, dict):
        raise CorruptShardError(f"{file_name}: {METADATA_KEY} is {shown(metadata)}, not an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CorruptShardError(f"{file_name}: {METADATA_KEY} has {shown(value)} under {shown(key)}, not a string")
    return metadata


def _stored_tensor(name: str, entry: Any, data_start: int, file_name: str) -> StoredTensor:
    """Check one header entry: its fields, and whether dtype, shape and offsets agree."""
    where = f"{file_name}: tensor {shown(name)}"
    if not isinstance(entry, HeaderEntry):
        raise _invalid_entry(entry, where)
    if entry.dtype not in DTYPE_BITS:
        raise CorruptShardError(f"{where} has the unknown dtype {shown(entry.dtype)}")
    if entry.begin > entry.end:
        raise CorruptShardError(f"{where} begins at {entry.begin:,} and ends before that, at {entry.end:,}")
    size_bytes = _size_bytes(entry, where)
    if size_bytes != entry.end - entry.begin:
        raise CorruptShardError(
            f"{where} is {entry.dtype} {shown(list(entry.shape))}, {size_bytes:,} bytes, but its offsets "
            f"{entry.begin:,} to {entry.end:,} span {entry.end - entry.begin:,}"
        )
    return StoredTensor(TensorSpec(name, entry.dtype, entry.shape), data_start + entry.begin)


def _invalid_entry(entry: Any, where: str) -> CorruptShardError:
    """The error for a header entry that lacks a field, or has one of the wrong type."""
    if not isinstance(entry, dict) or not entry.keys() >= ENTRY_FIELDS:  # the reference reader ignores other fields
        found = ", ".join(map(shown, entry)) if isinstance(entry, dict) else shown(entry)
        return CorruptShardError(f"{where} must have dtype, shape and data_offsets; it has {found[:400] or 'nothing'}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        return CorruptShardError(f"{where} has the unknown dtype {shown(dtype)}")
    if not are_counts(shape):
        return CorruptShardError(f"{where} has the shape {shown(shape)}, not a list of whole numbers")
    return CorruptShardError(f"{where} has the data_offsets {shown(offsets)}, not two whole numbers")


def _size_bytes(entry: HeaderEntry, where: str) -> int:
    """The bytes of a tensor. Refuses a shape whose size would overflow in a reader with 64-bit integers."""
    numel = 1
    for extent in entry.shape:
        numel *= extent
        if numel > U64_MAX:
            break
    bits = numel * DTYPE_BITS[entry.dtype]
    shape = list(entry.shape)
    if bits > U64_MAX:
        raise CorruptShardError(f"{where} has a shape whose size overflows 64 bits: {shown(shape)}")
    if any(extent > _LARGEST_EXTENT for extent in shape):  # of a tensor without elements
        raise CorruptShardError(f"{where} has an extent beyond 63 bits, which no tensor has: {shown(shape)}")
    if bits % 8:
        raise CorruptShardError(f"{where} is {entry.dtype} {shown(shape)}, {bits:,} bits, not a whole number of bytes")
    return bits // 8


def _check_coverage(tensors: Sequence[StoredTensor], data_start: int, file_name: str, file_bytes: int) -> None:
    """Check the format's rule that the tensors, in file order, cover the data without overlaps, gaps or a rest.

    The rule prevents a second file from hiding in the first.
    """
    end, before = data_start, "the header"
    for tensor in tensors:
        if tensor.offset_bytes != end:
            fault = "overlaps" if tensor.offset_bytes < end else "leaves a gap after"
            raise CorruptShardError(
                f"{file_name}: tensor {shown(tensor.spec.name)} begins at data offset "
                f"{tensor.offset_bytes - data_start:,} and {fault} {before}, which ends at {end - data_start:,}"
            )
        end, before = tensor.end_bytes, f"tensor {shown(tensor.spec.name)}"
    if end > file_bytes:
        raise CorruptShardError(
            f"{file_name}: header claims {end:,} bytes, the file has {file_bytes:,}; {before} ends beyond it",
            hint=GET_IT_AGAIN,
        )
    if end < file_bytes:
        raise CorruptShardError(
            f"{file_name}: {file_bytes - end:,} bytes follow the last tensor, which ends at {end:,}"
        )
