"""Which expressions of a config.json are matched: those that loaders and convert write, none that takes any time."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from int8cli.loaders.expressions import NOT_AN_EXPRESSION, slow, strings_in
from int8cli.planning.layouts import bitsandbytes, compressed_tensors

pytestmark = pytest.mark.filterwarnings("ignore:Possible:FutureWarning")

USUAL = (
    "lm_head",
    r"(?:.*\.)?lm_head$",
    r"re:.*\.experts(\.|$)",
    r"re:(?:.*\.)?vision_tower\..*$",
    "re:.*self_attn.(q|k|v|o)_proj$",
    "re:^model.layers.(" + "|".join(map(str, range(60))) + ").mlp.*",
    r"re:(?!.*experts).*",
    r"(?:^|.*[.(*+])layers\.[0-9]+\.(?P<part>mlp|attn)",
)
ENDLESS = (
    "(a+)+$",
    "(a|a)*$",
    r"(\w+\.?)+$",
    "((a)?)*",
    "a?" * 30 + "a" * 30,
    "(?:a|a)" * 40,
    ".*a" * 12,
    r"(?i:\w*)+",
)


@pytest.mark.parametrize("entry", USUAL)
def test_usual_entries_are_matched(entry: str) -> None:
    assert slow([entry], ["n" * 200]) == []


@pytest.mark.parametrize("entry", ENDLESS)
def test_endless_entries_are_not(entry: str) -> None:
    re.compile(entry)
    assert slow(["lm_head", entry, 7], ["n" * 100]) == [entry]


def test_many_matches_share_what_they_may_take() -> None:
    entries, names = [f".*.*.*.*{number}" for number in range(1000)], ["n" * 100] * 1000
    assert slow(entries[:1], names[:1]) == []
    assert 900 < len(slow(entries, names)) < 1000


def test_entries_of_a_large_vision_mixture_are_matched() -> None:
    model = "model.language_model.layers"
    names = [f"{model}.{n % 96}.mlp.experts.{n // 96}.down_proj.weight_scale" for n in range(72_000)]
    gates = [rf"re:(?:.*\.)?{re.escape(model)}\.{layer}\.mlp\.gate$" for layer in range(96)]
    assert slow([*gates, r"re:(?:.*\.)?visual\..*$", r"re:(?:.*\.)?lm_head$"], names) == []


@pytest.mark.parametrize(
    "entry", ["[" * 100_000, "(" * 3000 + ")" * 3000, "a{99999999999999999999}", "(a"], ids=range(4)
)
def test_what_is_no_expression_is_seen_at_once(entry: str) -> None:
    assert slow([entry], ["n" * 100]) == []
    assert not bitsandbytes.leaves_alone(entry, "m.q_proj")
    assert not compressed_tensors.leaves_alone(f"re:{entry}", "m.q_proj")


def test_strings_are_found_wherever_they_are() -> None:
    assert set(strings_in({"a": ["b", {"c": "d"}], "e": 1, "f": [["g"]]})) == {"b", "d", "g"}


@settings(max_examples=300, deadline=None)
@given(st.text("a.|?*+{}()[]\\2,:", max_size=24))
def test_what_is_matched_ends(entry: str) -> None:
    """A name of 40 letters that the expression does not match to its end: the slowest case of most."""
    try:
        expression = re.compile(rf"(?:{entry})\Z")
    except NOT_AN_EXPRESSION:
        return
    if not slow([entry], ["n" * 41]):
        expression.match("a" * 40 + "!")
