"""JSON from untrusted files: parsed with limits, and read into dataclasses by their annotations.

Owns which JSON is accepted, how deep it may nest, and how an error names the invalid value. Knows no document.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

MOST_NESTED = 100
_LARGEST = 2**63 - 1  # the largest size or offset of a file

Declared = TypeVar("Declared")


class InvalidJsonError(ValueError):
    """What is wrong with a value, and its place, such as `shards[0].output`. Callers add the file's name."""

    def __init__(self, problem: str, place: str = "") -> None:
        super().__init__(f"{place} {problem}".strip())
        self.problem, self.place = problem, place

    def inside(self, outer: str) -> "InvalidJsonError":
        """The same error with a longer place: `outer` is the field or `[index]` that contains the invalid value."""
        dot = "" if not self.place or self.place.startswith("[") else "."
        return InvalidJsonError(self.problem, f"{outer}{dot}{self.place}")


@contextmanager
def inside(outer: str) -> Iterator[None]:
    """Add `outer` to the place in an InvalidJsonError raised in this context."""
    try:
        yield
    except InvalidJsonError as error:
        raise error.inside(outer) from None


def parse_json(text: bytes, *, unique_keys: bool = True) -> Any:
    """Parse UTF-8 text that nests at most MOST_NESTED deep. Raises InvalidJsonError.

    NaN and infinities are accepted, as Python writes them. If keys need not be unique, the last value counts.
    """
    try:
        document = json.loads(text.decode(), object_pairs_hook=_unique if unique_keys else None)
    except RecursionError as error:
        raise InvalidJsonError(f"nests more than {MOST_NESTED} deep") from error
    except InvalidJsonError:
        raise
    except ValueError as error:
        raise InvalidJsonError(f"is not valid JSON: {error!s:.200}") from error
    _refuse_deep(document)
    return document


def read_as(declared: type[Declared], value: Any) -> Declared:
    """Convert a parsed document to the declared type. Raises InvalidJsonError at the first value that does not match.

    Supported are dataclasses (every field without a default must be there, and no others may), `tuple`, `dict` and
    `Mapping` with text keys, `Literal`, `X | None`, `str`, `bool`, `int`, `float`, and `Any`. Numbers must not be
    negative or NaN, and integers must fit into 63 bits. An integer is accepted for a float.
    """
    return cast(Declared, _reader(cast(Any, declared))(value))


def shown(value: object) -> str:
    """A value from a file, short enough to show."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise InvalidJsonError(f"names {shown(twice)} twice in one object")
    return result


def _refuse_deep(document: Any) -> None:
    level, depth = [document], 0
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        if depth > MOST_NESTED:
            raise InvalidJsonError(f"nests more than {MOST_NESTED} deep")
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]


@cache
def _reader(declared: Any) -> Callable[[Any], Any]:
    """A function that reads a value of one type. Built once for each type."""
    origin, arguments = get_origin(declared), get_args(declared)
    if declared is Any:
        return lambda value: value
    if is_dataclass(declared):
        return _dataclass_reader(cast(type, declared))
    if origin is tuple:
        return _tuple_reader(arguments)
    if origin in (dict, Mapping):
        return _dict_reader(arguments[1])
    if origin is Literal:
        return _literal_reader(arguments)
    if origin is UnionType and NoneType in arguments and len(arguments) == 2:
        other = _reader(next(each for each in arguments if each is not NoneType))
        return lambda value: None if value is None else other(value)
    return {str: _text, bool: _truth, int: _whole, float: _number}[declared]


def _dataclass_reader(declared: type) -> Callable[[Any], Any]:
    hints = get_type_hints(declared)
    readers = {field.name: _reader(hints[field.name]) for field in fields(declared)}
    required = [field.name for field in fields(declared) if field.default is field.default_factory is MISSING]

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise InvalidJsonError(f"is {shown(value)}, not an object")
        unknown = next((name for name in value if name not in readers), None)
        if unknown is not None:
            raise InvalidJsonError(f"has the unknown field {shown(unknown)}")
        missing = next((name for name in required if name not in value), None)
        if missing is not None:
            raise InvalidJsonError(f"has no field {missing!r}")
        return declared(**{name: _read_inside(readers[name], each, name) for name, each in value.items()})

    return read


def _tuple_reader(arguments: tuple[Any, ...]) -> Callable[[Any], Any]:
    of_any_length = arguments[1:] == (Ellipsis,)
    readers = [_reader(each) for each in arguments if each is not Ellipsis]

    def read(value: Any) -> Any:
        if not isinstance(value, list):
            raise InvalidJsonError(f"is {shown(value)}, not a list")
        if not of_any_length and len(value) != len(readers):
            raise InvalidJsonError(f"has {len(value)} values, not {len(readers)}")
        of_each = readers * len(value) if of_any_length else readers
        pairs = enumerate(zip(of_each, value, strict=True))
        return tuple(_read_inside(reader, each, f"[{index}]") for index, (reader, each) in pairs)

    return read


def _dict_reader(declared: Any) -> Callable[[Any], Any]:
    reader = _reader(declared)

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise InvalidJsonError(f"is {shown(value)}, not an object")
        return {_text(key): _read_inside(reader, each, f"[{shown(key)}]") for key, each in value.items()}

    return read


def _literal_reader(allowed: tuple[Any, ...]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) not in (str, int) or value not in allowed:
            raise InvalidJsonError(f"is {shown(value)}, not one of {', '.join(map(str, allowed))}")
        return value

    return read


def _read_inside(reader: Callable[[Any], Any], value: Any, place: str) -> Any:
    try:
        return reader(value)
    except InvalidJsonError as error:
        raise error.inside(place) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidJsonError(f"is {shown(value)}, not str")
    try:
        os.fsencode(value)  # fails for half a surrogate pair, which no file name or terminal accepts
    except UnicodeEncodeError:
        raise InvalidJsonError(f"is {shown(value)}, which is not text") from None
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidJsonError(f"is {shown(value)}, not bool")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidJsonError(f"is {shown(value)}, not int")
    if not 0 <= value <= _LARGEST:
        raise InvalidJsonError(f"is {shown(value)}, which is out of range")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InvalidJsonError(f"is {shown(value)}, not float")
    if isinstance(value, int):
        return float(_whole(value))
    if math.isnan(value) or value < 0:
        raise InvalidJsonError(f"is {shown(value)}, which is out of range")
    return value
