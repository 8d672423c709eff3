"""Whether a record that was read holds what its fields are declared to: a flipped bit may leave it valid JSON.

Owns that check; what the values mean is checked elsewhere.
"""

from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from int8cli.checkpoint.tensor import DTYPE_BITS
from int8cli.records.store import ShardRecord


def record_problem(record: ShardRecord) -> str | None:
    """The first value of a record that cannot be: of another type, negative, or an unknown dtype."""
    found = next(_misfits(record, ShardRecord, ""), None)
    if found is not None:
        return found
    for file in record.files:
        for tensor in file.tensors:
            if tensor.dtype not in DTYPE_BITS:
                return f"{file.file}: {tensor.name} has the unknown dtype {tensor.dtype!r}"
    unknown = next((spec for spec in record.source_tensors if spec.dtype not in DTYPE_BITS), None)
    return f"{unknown.name} of the source has the unknown dtype {unknown.dtype!r}" if unknown is not None else None


def _misfits(value: Any, declared: Any, place: str) -> Iterator[str]:
    """Where values are not of their declared types; all numbers of a record count something."""
    if isinstance(declared, type) and is_dataclass(declared):
        for name, wanted in _declarations(declared).items():
            yield from _misfits(getattr(value, name), wanted, f"{place}.{name}".lstrip("."))
    elif get_origin(declared) is tuple:
        yield from _misfits_of_tuple(value, get_args(declared), place)
    elif isinstance(declared, UnionType):
        if value is not None:
            yield from _misfits(value, next(each for each in get_args(declared) if each is not NoneType), place)
    elif not isinstance(value, (int, float) if declared is float else declared) or isinstance(value, bool):
        yield f"{place} is {value!r}, not {declared.__name__}"
    elif isinstance(value, (int, float)) and value < 0:
        yield f"{place} is {value!r}"


@cache
def _declarations(declared: type) -> dict[str, Any]:
    return get_type_hints(declared)


def _misfits_of_tuple(value: Any, declared: tuple[Any, ...], place: str) -> Iterator[str]:
    if not isinstance(value, tuple):
        yield f"{place} is {value!r}, not a list"
        return
    of_each = [declared[0]] * len(value) if declared[1:] == (Ellipsis,) else list(declared)
    if len(of_each) != len(value):
        yield f"{place} holds {len(value)} values, not {len(of_each)}"
        return
    for index, (each, wanted) in enumerate(zip(value, of_each, strict=True)):
        yield from _misfits(each, wanted, f"{place}[{index}]")
