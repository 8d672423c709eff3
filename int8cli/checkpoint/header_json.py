"""The JSON of a safetensors header, parsed as strictly as the format's own reader (serde_json) parses it.

Owns which JSON is accepted, and the bounds on what a header may contain. Knows no dtype and no offset's meaning.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from int8cli.errors import CheckpointError, CorruptShardError

# Our own bounds, so that a conversion takes seconds and hundreds of MB beside its weights (docs/limits.md has figures).
# Today's largest models have 140,000 tensors in all of their files together. A header has eight numbers and strings for
# each tensor.
MOST_TENSORS = 1 << 18
_MOST_VALUES = 1 << 21

ENTRY_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
U64_MAX = 2**64 - 1
_MOST_NESTED = 127  # the recursion limit of serde_json
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_NO_BRACKET = re.compile(rb"[^\[\]{}]+")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """The description of a tensor, whose values have the right types, in little memory. Offsets are into the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(text: bytes, file_name: str) -> dict[str, Any]:
    """The header as a dict, in which each object with the fields of a tensor, in their types, is a HeaderEntry.

    Raises CorruptShardError for anything that the format's reader would not parse, CheckpointError for more than
    MOST_TENSORS tensors.
    """
    _check_bounds(text, file_name)
    # The format's own reader accepts JSON whitespace on both sides: writers pad with it to align the data.
    if not text.lstrip(b" \t\r\n").startswith(b"{"):
        raise CorruptShardError(f"{file_name}: the header is not a JSON object: it does not start with '{{'")
    try:
        header: dict[str, Any] | HeaderEntry = json.loads(
            text.decode("utf-8"), object_pairs_hook=_Objects(text).unique, parse_int=_u64, parse_constant=_no_constant
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
    if _nests_too_deep(text):
        raise CorruptShardError(f"{file_name}: the header nests too deeply")
    if isinstance(header, HeaderEntry):
        raise CorruptShardError(f"{file_name}: the header describes one tensor instead of naming its tensors")
    return header


def shown(value: object) -> str:
    """A value from the file, short enough and safe to show."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


def are_counts(value: Any) -> bool:
    """Whether a value is a list of integers. The parser has already refused negative and oversized ones."""
    return isinstance(value, list) and all(type(number) is int for number in value)  # a bool is an int to isinstance


def _check_bounds(text: bytes, file_name: str) -> None:
    """A cheap check before parsing. `_Objects` also counts what this does not see, such as escaped names."""
    if text.count(b'"data_offsets"') > MOST_TENSORS or text.count(b",") > _MOST_VALUES:
        raise _too_many(file_name)


def _nests_too_deep(text: bytes) -> bool:
    """Whether valid JSON nests deeper than serde_json reads, also in a field that no reader uses.

    Counts only where there are more brackets than tensors need: two lists and an object each.
    """
    tensors = text.count(b'"data_offsets"')
    if text.count(b"[") <= 2 * tensors and text.count(b"{") <= tensors + 2:
        return False
    depth = 0
    for bracket in _NO_BRACKET.sub(b"", _STRING.sub(b"", text)):
        depth += 1 if bracket in b"[{" else -1
        if depth > _MOST_NESTED:
            return True
    return False


def _too_many(file_name: str) -> CheckpointError:
    return CheckpointError(
        f"{file_name}: the header has more than {MOST_TENSORS:,} tensors or {_MOST_VALUES:,} values, the most that are "
        "read",
        hint="Split the file into shards, as save_pretrained does.",
    )


class _TooManyError(Exception):
    """The header has more objects than tensors are allowed."""


class _Objects:
    """Converts the objects of one header while they are parsed, the innermost first."""

    def __init__(self, text: bytes) -> None:
        self._may_have_surrogates = _SURROGATE_ESCAPE.search(text) is not None
        self._count = 0
        self._dtypes: dict[str, str] = {}
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def unique(self, pairs: list[tuple[str, Any]]) -> "dict[str, Any] | HeaderEntry":
        """An object whose names must be unique. Raises ValueError, _TooManyError."""
        self._count += 1
        if self._count > MOST_TENSORS + 2:  # the header itself and its metadata
            raise _TooManyError
        result = dict(pairs)
        if len(result) != len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the header names {shown(twice)} twice")
        if self._may_have_surrogates:
            _refuse_surrogates(pairs)
        return self._entry(result) if result.keys() >= ENTRY_FIELDS else result

    def _entry(self, fields: dict[str, Any]) -> "dict[str, Any] | HeaderEntry":
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or not are_counts(shape) or not are_counts(offsets) or len(offsets) != 2:
            return fields
        dtype, extents = self._dtypes.setdefault(dtype, dtype), tuple(shape)
        return HeaderEntry(dtype, self._shapes.setdefault(extents, extents), *offsets)


def _refuse_surrogates(pairs: list[tuple[str, Any]]) -> None:
    """Raise ValueError for half a surrogate pair in an object's names and texts, also inside lists.

    Python decodes a lone "\\ud800", but it is not valid UTF-8, and no other reader accepts it. Objects inside were
    checked before.
    """
    for key, value in pairs:
        left = [key, value]
        while left:
            each = left.pop()
            if isinstance(each, str) and SURROGATE.search(each):
                raise ValueError(f"the header has half a surrogate pair at {shown(key)}")
            if isinstance(each, list):
                left += each


def _u64(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"the header has a negative number, {shown(digits)}")
    if len(digits) > len(str(U64_MAX)) or int(digits) > U64_MAX:
        raise ValueError(f"the header has a number beyond 64 bits, {shown(digits)}")
    return int(digits)


def _no_constant(constant: str) -> Any:
    raise ValueError(f"the header has {constant}, which is not JSON")
