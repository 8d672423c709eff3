"""The safetensors header: read from a file's first bytes, and written for a file that is yet to be filled.

Owns the rules of the format (https://github.com/huggingface/safetensors#format); at least as strict as the format's own
reader. Knows nothing of a tensor's data, nor of which tensors a model needs.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from int8cli.checkpoint.disk import GET_IT_AGAIN
from int8cli.checkpoint.tensor import DTYPE_BITS, ShardContents, StoredTensor, TensorSpec
from int8cli.errors import CheckpointError, CorruptShardError

HEADER_LIMIT_BYTES = 100_000_000  # the format's own bound, `MAX_HEADER_SIZE`
# Bounds of ours, so that a header is read in seconds and a few hundred MB. The largest models of today have 140,000
# tensors in all of their files together; the numbers and strings in a header are eight for each.
MOST_TENSORS = 1 << 18
_MOST_VALUES = 1 << 21
METADATA_KEY = "__metadata__"

_LENGTH_BYTES = 8
_U64_MAX = 2**64 - 1
_ENTRY_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
# The enum of the format's serializer is declared in this order and sorted by it, widest last.
_DTYPE_ORDER = {dtype: order for order, dtype in enumerate(DTYPE_BITS)}
_SURROGATE = re.compile("[\ud800-\udfff]")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MARKUP = (b"<!doctype", b"<html", b"<?xml")


def read_header(file: BinaryIO, file_name: str, file_bytes: int) -> ShardContents:
    """Read what a safetensors file of `file_bytes` bytes holds: its tensors by offset, absolute in the file.

    Reads the header alone. Raises CorruptShardError for every departure from the format, naming file, tensor and place,
    and CheckpointError for more than MOST_TENSORS tensors.
    """
    text = _read_text(file, file_name, file_bytes)
    _check_bounds(text, file_name)
    header = _parse(text, file_name)
    metadata = _checked_metadata(header.pop(METADATA_KEY, {}), file_name)
    data_start = _LENGTH_BYTES + len(text)
    tensors = sorted(
        (_stored_tensor(name, entry, data_start, file_name) for name, entry in header.items()),
        key=lambda tensor: (tensor.offset_bytes, tensor.end_bytes, tensor.spec.name),
    )
    _check_coverage(tensors, data_start, file_name, file_bytes)
    return ShardContents(file_name, tuple(tensors), metadata, file_bytes)


def encode_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, tuple[StoredTensor, ...]]:
    """Lay tensors out in a new file: its first bytes, and the place of each tensor in file order.

    Widest dtype first, then by name, without holes: the order of the format's own serializer, which keeps every tensor
    aligned to its width. Names must be unique. Raises CheckpointError where the format cannot hold the tensors.
    """
    ordered = sorted(specs, key=lambda spec: (-_DTYPE_ORDER[spec.dtype], spec.name))
    header: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for spec in ordered:
        if spec.name in header or spec.name == METADATA_KEY or _SURROGATE.search(spec.name):
            raise CheckpointError(f"a safetensors file cannot contain a tensor named {spec.name!r}")
        begin, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT_BYTES or len(ordered) > MOST_TENSORS:
        raise CheckpointError(
            f"a header for {len(ordered):,} tensors takes {len(text):,} bytes; {HEADER_LIMIT_BYTES:,} bytes and "
            f"{MOST_TENSORS:,} tensors are the most",
            hint="Convert the model from more and smaller shards.",
        )
    data_start = _LENGTH_BYTES + len(text)
    stored = tuple(StoredTensor(spec, data_start + header[spec.name]["data_offsets"][0]) for spec in ordered)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, stored


def refuse_stand_in(head: bytes, file_name: str) -> None:
    """Raise CorruptShardError if a file's first bytes are those of something commonly found in place of weights."""
    if head.startswith(_LFS_POINTER):
        raise CorruptShardError(
            f"{file_name} is a git-lfs pointer, not the weights",
            hint="Run `git lfs pull` in the directory, or give the model's Hub id instead.",
        )
    if head.lstrip().lower().startswith(_MARKUP):
        raise CorruptShardError(
            f"{file_name} is a web page, not the weights",
            hint="The server's error page was saved under this name: download the file again.",
        )


def _read_text(file: BinaryIO, file_name: str, file_bytes: int) -> bytes:
    """The header's JSON as bytes, once its length is known to be one that the file can hold."""
    file.seek(0)
    head = file.read(64)
    refuse_stand_in(head, file_name)
    if min(len(head), file_bytes) < _LENGTH_BYTES:
        raise CorruptShardError(
            f"{file_name}: the file has {file_bytes:,} bytes, fewer than the {_LENGTH_BYTES} of a header length",
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


def _check_bounds(text: bytes, file_name: str) -> None:
    """A first look at how much a header holds. `_Objects` counts again what is written in another way."""
    if text.count(b'"data_offsets"') > MOST_TENSORS or text.count(b",") > _MOST_VALUES:
        raise _too_many(file_name)


def _too_many(file_name: str) -> CheckpointError:
    return CheckpointError(
        f"{file_name}: the header names more than {MOST_TENSORS:,} tensors, or as many values; no more are read",
        hint="Split the file into shards, as save_pretrained does.",
    )


def _parse(text: bytes, file_name: str) -> dict[str, Any]:
    """The header as a dict, held to the JSON of the format's reader (serde_json), which is narrower than Python's.

    What describes a tensor is an `_Entry` in it where its values are of the right types.
    """
    # The format's own reader lets JSON whitespace stand on either side: writers pad with it to align the data.
    if not text.lstrip(b" \t\r\n").startswith(b"{"):
        raise CorruptShardError(f"{file_name}: the header is not a JSON object: it does not start with '{{'")
    try:
        header: dict[str, Any] | _Entry = json.loads(
            text.decode("utf-8"), object_pairs_hook=_Objects().unique, parse_int=_u64, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise CorruptShardError(f"{file_name}: the header is not UTF-8 at byte {8 + error.start:,}") from error
    except json.JSONDecodeError as error:
        raise CorruptShardError(
            f"{file_name}: the header is not valid JSON at character {error.pos:,}: {error.msg}"
        ) from error
    except RecursionError as error:
        raise CorruptShardError(f"{file_name}: the header nests too deeply") from error
    except ValueError as error:
        raise CorruptShardError(f"{file_name}: {error}") from error
    except _TooManyError:
        raise _too_many(file_name) from None
    if isinstance(header, _Entry):
        raise CorruptShardError(f"{file_name}: the header describes one tensor, where tensors by name belong")
    return header


class _TooManyError(Exception):
    """The header has more objects than tensors are allowed."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor's description, of the right types, in the least memory."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Objects:
    """Takes the objects of one header as they are parsed, the innermost first."""

    def __init__(self) -> None:
        self._count = 0
        self._dtypes: dict[str, str] = {}
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def unique(self, pairs: list[tuple[str, Any]]) -> "dict[str, Any] | _Entry":
        self._count += 1
        if self._count > MOST_TENSORS + 2:  # the header itself and its metadata
            raise _TooManyError
        result = dict(pairs)
        if len(result) != len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the header names {_shown(twice)} twice")
        for key, value in pairs:
            # Python decodes a lone "\ud800"; no UTF-8 string can hold it, and no other reader takes it.
            if _SURROGATE.search(key) or (isinstance(value, str) and _SURROGATE.search(value)):
                raise ValueError(f"the header has half a surrogate pair at {_shown(key)}")
        return self._entry(result) if result.keys() >= _ENTRY_FIELDS else result

    def _entry(self, fields: dict[str, Any]) -> "dict[str, Any] | _Entry":
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
            return fields
        dtype, extents = self._dtypes.setdefault(dtype, dtype), tuple(shape)
        return _Entry(dtype, self._shapes.setdefault(extents, extents), *offsets)


def _u64(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"the header has a negative number, {_shown(digits)}")
    if len(digits) > len(str(_U64_MAX)) or int(digits) > _U64_MAX:
        raise ValueError(f"the header has a number beyond 64 bits, {_shown(digits)}")
    return int(digits)


def _no_constant(constant: str) -> Any:
    raise ValueError(f"the header has {constant}, which is not JSON")


def _shown(value: object) -> str:
    """A value from the file, short enough and safe to show."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _checked_metadata(metadata: Any, file_name: str) -> dict[str, str]:
    if metadata is None:  # as good as none at all to the reference reader
        return {}
    if not isinstance(metadata, dict):
        raise CorruptShardError(f"{file_name}: {METADATA_KEY} is {_shown(metadata)}, not an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CorruptShardError(
                f"{file_name}: {METADATA_KEY} has {_shown(value)} under {_shown(key)}, not a string"
            )
    return metadata


def _stored_tensor(name: str, entry: Any, data_start: int, file_name: str) -> StoredTensor:
    """One header entry, checked for itself: its fields, and that dtype, shape and offsets agree."""
    where = f"{file_name}: tensor {_shown(name)}"
    if not isinstance(entry, _Entry):
        raise _misfit(entry, where)
    if entry.dtype not in DTYPE_BITS:
        raise CorruptShardError(f"{where} has the unknown dtype {_shown(entry.dtype)}")
    if entry.begin > entry.end:
        raise CorruptShardError(f"{where} begins at {entry.begin:,} and ends before that, at {entry.end:,}")
    size_bytes = _size_bytes(entry, where)
    if size_bytes != entry.end - entry.begin:
        raise CorruptShardError(
            f"{where} is {entry.dtype} {_shown(list(entry.shape))}, {size_bytes:,} bytes, but its offsets "
            f"{entry.begin:,} to {entry.end:,} span {entry.end - entry.begin:,}"
        )
    return StoredTensor(TensorSpec(name, entry.dtype, entry.shape), data_start + entry.begin)


def _misfit(entry: Any, where: str) -> CorruptShardError:
    """What is wrong with a header entry whose fields are not all there, or not of their types."""
    if not isinstance(entry, dict) or not entry.keys() >= _ENTRY_FIELDS:  # the reference passes over other fields
        found = ", ".join(map(_shown, entry)) if isinstance(entry, dict) else _shown(entry)
        return CorruptShardError(f"{where} must have dtype, shape and data_offsets, it has {found[:400] or 'nothing'}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        return CorruptShardError(f"{where} has the unknown dtype {_shown(dtype)}")
    if not _are_counts(shape):
        return CorruptShardError(f"{where} has the shape {_shown(shape)}, not a list of whole numbers")
    return CorruptShardError(f"{where} has the data_offsets {_shown(offsets)}, not two whole numbers")


def _are_counts(value: Any) -> bool:
    # A bool is an int to Python; negative and oversized numbers did not pass the parser.
    return isinstance(value, list) and all(type(number) is int for number in value)


def _size_bytes(entry: _Entry, where: str) -> int:
    """Bytes of a tensor, computed as a reader with 64-bit integers would, so that we accept nothing it overflows on."""
    numel = 1
    for extent in entry.shape:
        numel *= extent
        if numel > _U64_MAX:
            break
    bits = numel * DTYPE_BITS[entry.dtype]
    shape = list(entry.shape)
    if bits > _U64_MAX:
        raise CorruptShardError(f"{where} has a shape whose size overflows 64 bits: {_shown(shape)}")
    if bits % 8:
        raise CorruptShardError(f"{where} is {entry.dtype} {_shown(shape)}, {bits:,} bits, which end inside a byte")
    return bits // 8


def _check_coverage(tensors: Sequence[StoredTensor], data_start: int, file_name: str, file_bytes: int) -> None:
    """Hold tensors in file order to the format's rule: they cover the data without overlap, hole or rest.

    The rule is what keeps a second file from hiding in the first.
    """
    end, before = data_start, "the header"
    for tensor in tensors:
        if tensor.offset_bytes != end:
            fault = "overlaps" if tensor.offset_bytes < end else "leaves a hole after"
            raise CorruptShardError(
                f"{file_name}: tensor {_shown(tensor.spec.name)} begins at data offset "
                f"{tensor.offset_bytes - data_start:,} and {fault} {before}, which ends at {end - data_start:,}"
            )
        end, before = tensor.end_bytes, f"tensor {_shown(tensor.spec.name)}"
    if end > file_bytes:
        raise CorruptShardError(
            f"{file_name}: header claims {end:,} bytes, the file has {file_bytes:,}; {before} ends outside of it",
            hint=GET_IT_AGAIN,
        )
    if end < file_bytes:
        raise CorruptShardError(
            f"{file_name}: {file_bytes - end:,} bytes follow the last tensor, which ends at {end:,}"
        )
