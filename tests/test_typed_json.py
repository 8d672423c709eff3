"""JSON from anywhere becomes an object of the declared type, or an error that names the place."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8cli.typed_json import MOST_NESTED, InvalidJsonError, parse_json, read_as


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Whole:
    kind: Literal["a", "b"]
    parts: tuple[Part, ...]
    span: tuple[int, float]
    share: float | None
    by_name: dict[str, bool]
    loose: Any = None
    steps: Literal[1, 4] = 1


GOOD: dict[str, Any] = {
    "kind": "a",
    "parts": [{"name": "x", "sizes": [1, 2]}, {"name": "y"}],
    "span": [1, 2],
    "share": None,
    "by_name": {"z": True},
    "loose": [{}],
}


def test_a_document_is_read_into_the_declared_type() -> None:
    whole = read_as(Whole, parse_json(json.dumps(GOOD).encode()))
    assert whole == Whole("a", (Part("x", (1, 2)), Part("y")), (1, 2.0), None, {"z": True}, [{}])
    assert type(whole.span[1]) is float
    assert read_as(Whole, GOOD | {"steps": 4}).steps == 4
    assert hash(whole.parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "c"}, "kind is 'c', not one of a, b"),
        ({"kind": []}, "kind is [], not one of a, b"),
        ({"steps": 2}, "steps is 2, not one of 1, 4"),
        ({"steps": True}, "steps is True, not one of 1, 4"),
        ({"steps": 1.0}, "steps is 1.0, not one of 1, 4"),
        ({"parts": {}}, "parts is {}, not a list"),
        ({"parts": [5]}, "parts[0] is 5, not an object"),
        ({"parts": [{"name": "x"}, {"name": 5}]}, "parts[1].name is 5, not str"),
        ({"parts": [{"name": "x", "sizes": [0, True]}]}, "parts[0].sizes[1] is True, not int"),
        ({"parts": [{"name": "x", "sizes": [1.0]}]}, "parts[0].sizes[0] is 1.0, not int"),
        ({"parts": [{"name": "x", "sizes": [-1]}]}, "parts[0].sizes[0] is -1, which is out of range"),
        ({"parts": [{"name": "x", "sizes": [2**63]}]}, "which is out of range"),
        ({"parts": [{"sizes": []}]}, "parts[0] has no field 'name'"),
        ({"parts": [{"name": "x", "size": 1}]}, "parts[0] has the unknown field 'size'"),
        ({"span": [1]}, "span has 1 values, not 2"),
        ({"span": [1, "2"]}, "span[1] is '2', not float"),
        ({"span": [1, False]}, "span[1] is False, not float"),
        ({"span": [1, 10**400]}, "span[1] is 1000"),
        ({"share": math.nan}, "share is nan, which is out of range"),
        ({"share": -0.5}, "share is -0.5, which is out of range"),
        ({"by_name": {"z": 1}}, "by_name['z'] is 1, not bool"),
        ({"by_name": [True]}, "by_name is [True], not an object"),
        ({"by_name": {"\ud800": True}}, "which is not text"),
    ],
)
def test_the_first_value_that_is_not_as_declared_is_named(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InvalidJsonError) as raised:
        read_as(Whole, parse_json(json.dumps({**GOOD, **change}).encode()))
    assert message in str(raised.value)


@pytest.mark.parametrize("document", [None, 5, "x", [], True])
def test_a_document_that_is_not_an_object_is_refused(document: Any) -> None:
    with pytest.raises(InvalidJsonError, match="not an object"):
        read_as(Whole, document)


def test_an_optional_value_may_be_null() -> None:
    assert read_as(cast(Any, str | None), None) is None
    assert read_as(cast(Any, str | None), "x") == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[1] 2", "not valid JSON"),
        (b"1" * 5000, "not valid JSON"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "names 'b' twice"),
        (b"[" * (MOST_NESTED + 1) + b"]" * (MOST_NESTED + 1), "nests more than"),
        (b"[" * 900 + b"]" * 900, "nests more than"),
        (b'{"a":' * 300_000 + b"1" + b"}" * 300_000, "nests more than"),
    ],
)
def test_what_is_not_json_within_bounds_is_an_error(text: bytes, message: str) -> None:
    with pytest.raises(InvalidJsonError, match=message):
        parse_json(text)


def test_what_python_writes_is_read() -> None:
    deepest = b"[" * MOST_NESTED + b"]" * MOST_NESTED
    assert parse_json(deepest) is not None
    assert parse_json(b'{"a": 1, "a": 2}', unique_keys=False) == {"a": 2}
    assert parse_json(json.dumps([math.inf]).encode()) == [math.inf]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(sorted(GOOD)), values)
def test_any_value_anywhere_is_read_or_named(field: str, value: Any) -> None:
    problem = field
    try:
        read_as(Whole, parse_json(json.dumps({**GOOD, field: value}).encode()))
    except InvalidJsonError as error:
        problem = str(error)
    assert problem.startswith((field, "is not valid JSON"))  # more than 4,300 digits are no number to Python
