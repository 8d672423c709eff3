"""Which regular expressions of a file are matched.

`re` tries every way to match: `(a+)+$` takes twice as long for each further letter. The loaders match the entries of
`llm_int8_skip_modules`, `ignore` and `targets` with it, and a config.json can come from anyone.
"""

import math
import re
import warnings
from collections.abc import Collection, Iterator
from typing import Any

# Of an expression in a file, which nobody here can change.
warnings.filterwarnings("ignore", "Possible (nested set|set difference|set union|set intersection)", FutureWarning)

# What `re` raises for a text that is no expression.
NOT_AN_EXPRESSION = (re.error, OverflowError, RecursionError)

# Entries times layers: some minutes. 15,000 layers that are left alone beside 30,000 are 450 million.
MATCHES_AT_MOST = 1_000_000_000
# Of one match: far more than loaders' expressions and those of convert need; a tenth of a second.
_WAYS_AT_MOST = 10_000_000
# What an entry for one layer takes is below the first. All matches of the others together: a minute or two.
_USUAL_WAYS, _WAYS_IN_ALL = 1_000, 30_000_000_000
_ONE_CHARACTER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_EXTENSION = re.compile(r"\(\?(?:P<\w*>|P=\w*|<?[=!]|[:>]|[a-zA-Z-]*:)")
_TOKEN = re.compile(r"[()|?]|[*+{][?+]?|[^()|?*+{]+")


def slow(entries: Collection[Any], names: Collection[str]) -> list[str]:
    """The entries that `re` may take long to match with these names. What is no expression is not among them."""
    longest = max(map(len, names), default=0)
    ways = {entry: _ways(entry, longest) for entry in entries if isinstance(entry, str) and _is_expression(entry)}
    left, found = float(_WAYS_IN_ALL), set()
    for entry in sorted(ways, key=lambda entry: ways[entry]):
        left -= ways[entry] * len(names) if ways[entry] > _USUAL_WAYS else 0
        if ways[entry] > _WAYS_AT_MOST or left < 0:
            found.add(entry)
    return [entry for entry in ways if entry in found]


def strings_in(value: object) -> Iterator[str]:
    """Every string in a JSON value, but no key."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, (list, dict)):
            waiting.extend(each.values() if isinstance(each, dict) else each)


def _is_expression(entry: str) -> bool:
    try:
        re.compile(entry)
    except NOT_AN_EXPRESSION:
        return False
    return True


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
