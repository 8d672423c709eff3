"""Which expressions of a config.json are matched: those that loaders and convert write, none that takes any time."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from int8cli.loaders.expressions import slow

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
    assert slow([entry], 200) == []


@pytest.mark.parametrize("entry", ENDLESS)
def test_endless_entries_are_not(entry: str) -> None:
    re.compile(entry)
    assert slow(["lm_head", entry, 7], 100) == [entry]


@settings(max_examples=300, deadline=None)
@given(st.text("a.|?*+{}()[]\\2,:", max_size=24))
def test_what_is_matched_ends(entry: str) -> None:
    """A name of 40 letters that the expression does not match to its end: the slowest case of most."""
    try:
        expression = re.compile(rf"(?:{entry})\Z")
    except (re.error, OverflowError, FutureWarning):
        return
    if not slow([entry], 41):
        expression.match("a" * 40 + "!")
