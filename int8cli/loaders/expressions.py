"""Which regular expressions of a file are matched.

`re` tries every way to match: `(a+)+$` takes twice as long for each further letter. The loaders match the entries of
`llm_int8_skip_modules` and `ignore` with it, and a config.json can come from anyone.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

# Far more than loaders' expressions and those of convert need; a tenth of a second.
_WAYS_AT_MOST = 10_000_000
_ONE_CHARACTER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_EXTENSION = re.compile(r"\(\?(?:P<\w*>|P=\w*|<?[=!]|[:>]|[a-zA-Z-]*:)")
_TOKEN = re.compile(r"[()|?]|[*+{][?+]?|[^()|?*+{]+")


def slow(entries: Iterable[Any], longest_name: int) -> list[str]:
    """The entries that `re` may take long to match with a name of so many characters."""
    return [entry for entry in entries if isinstance(entry, str) and _ways(entry, longest_name) > _WAYS_AT_MOST]


def _ways(expression: str, characters: int) -> float:
    """An upper bound of the ways to match a text of so many characters; infinite for a repeat in a repeat.

    Each repeat can end at any character, each `?` and each alternative doubles the ways or adds one.
    """
    plain = _EXTENSION.sub("(", _ONE_CHARACTER.sub("x", expression))
    repeats, factor = 0, 1.0
    groups = [_Group()]
    closed: _Group | None = None
    for token in _TOKEN.findall(plain):
        last, closed = closed, None
        if token == "(":
            groups.append(_Group())
        elif token == ")" and len(groups) > 1:
            closed = groups.pop()
            factor *= closed.alternatives
            groups[-1].varies |= closed.varies or closed.alternatives > 1
        elif token == "|":
            groups[-1].alternatives += 1
        elif token == "?":
            factor *= 2
            groups[-1].varies = True
        elif token[0] in "*+{":
            if last is not None and (last.varies or last.alternatives > 1):
                return math.inf
            repeats += 1
            groups[-1].varies = True
        if factor > _WAYS_AT_MOST:
            return math.inf
    return factor * (characters + 1.0) ** repeats / math.factorial(repeats) if repeats < 100 else math.inf


class _Group:
    """What is known of a group up to here: its alternatives, and whether it matches texts of several lengths."""

    def __init__(self) -> None:
        self.alternatives = 1
        self.varies = False
