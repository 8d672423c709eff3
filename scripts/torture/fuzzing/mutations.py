"""How an input is changed: by its bytes, or as JSON by its values.

Owns what is worth putting in the place of a byte, a number or a value.
"""

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

_BYTES = (0, 1, 9, 10, 32, 34, 44, 45, 46, 47, 58, 91, 92, 93, 123, 125, 127, 128, 194, 255)
_WHOLE = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)
_LONGEST = 1 << 16
_DEEP: Any = []
for _ in range(200):
    _DEEP = [_DEEP]
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 255, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "x", "a" * 300, "../x", "/etc/passwd", "int8/x", "a\0b", "\ud800", "\x1b[31m"),
    *(
        "F32",
        "I8",
        "BF16",
        "float32",
        "model.safetensors",
        "weight",
        [],
        {},
        [0],
        [[]],
        {"": 0},
        _DEEP,
        list(range(50)),
    ),
)


def change_bytes(random: Random, data: bytes, other: bytes) -> bytes:
    """Some bytes changed, taken away, repeated, or taken from another input."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 8))):
        random.choice(_STEPS)(random, changed, other)
    return bytes(changed[:_LONGEST])


def _flip(random: Random, data: bytearray, _: bytes) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _replace(random: Random, data: bytearray, _: bytes) -> None:
    if data:
        data[random.randrange(len(data))] = random.choice((*_BYTES, random.randrange(256)))


def _number(random: Random, data: bytearray, _: bytes) -> None:
    width = random.choice((1, 2, 4, 8))
    value = random.choice(_WHOLE) & ((1 << 8 * width) - 1)
    place = random.randrange(len(data) + 1)
    data[place : place + width] = value.to_bytes(width, random.choice(("little", "big")))


def _remove(random: Random, data: bytearray, _: bytes) -> None:
    place = random.randrange(len(data) + 1)
    del data[place : place + _some(random, len(data))]


def _repeat(random: Random, data: bytearray, _: bytes) -> None:
    start, place = random.randrange(len(data) + 1), random.randrange(len(data) + 1)
    data[place:place] = data[start : start + _some(random, len(data))] * random.choice((1, 1, 2, 16))


def _splice(random: Random, data: bytearray, other: bytes) -> None:
    start, place = random.randrange(len(other) + 1), random.randrange(len(data) + 1)
    piece = other[start : start + _some(random, len(other))]
    data[place : place + random.choice((0, len(piece)))] = piece


def _some(random: Random, length: int) -> int:
    return random.randrange(1, max(2, random.choice((4, 16, length))))


_STEPS: tuple[Callable[[Random, bytearray, bytes], None], ...] = (_flip, _replace, _number, _remove, _repeat, _splice)


def change_json(random: Random, data: bytes, other: bytes) -> bytes:
    """Values of a document replaced, taken away, renamed or moved; now and then its bytes."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(random, data, other)
    if random.random() < 0.15:
        return change_bytes(random, data, other)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        document = _changed(random, document)
    text = json.dumps(document)
    if random.random() < 0.05:
        text = text.replace("{", '{"": 0, "": 1, ', 1)
    return text.encode()[:_LONGEST]


def _changed(random: Random, document: Any) -> Any:
    places = list(_places(document))
    if not places:
        return copy.deepcopy(random.choice(_VALUES))
    holder, key = random.choice(places)
    what = random.random()
    if what < 0.55:
        holder[key] = _value(random, holder[key], document)
    elif what < 0.7:
        del holder[key]
    elif what < 0.8 and isinstance(holder, dict):
        holder[str(_value(random, key, document))[:400]] = holder.pop(key)
    elif isinstance(holder, list):
        holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    else:
        holder[f"{key}{random.choice(('', '.', '_', '0', '/x'))}x"] = copy.deepcopy(holder[key])
    return document


def _value(random: Random, before: Any, document: Any) -> Any:
    """Something near the value, something from elsewhere in the document, or something strange."""
    what = random.random()
    if what < 0.2 and isinstance(before, (int, float)) and not isinstance(before, bool):
        return random.choice((before + 1, before - 1, -before, before * 2, before * 1000, float(before), str(before)))
    if what < 0.2 and isinstance(before, str):
        return change_bytes(random, before.encode("utf-8", "replace"), b"").decode("utf-8", "replace")
    places = list(_places(document))
    if what < 0.4 and places:
        holder, key = random.choice(places)
        return copy.deepcopy(holder[key])
    return copy.deepcopy(random.choice(_VALUES))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every value below the document, as what holds it and its key there."""
    found, left = [], [value]
    while left:
        holder = left.pop()
        if isinstance(holder, (dict, list)):
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            found += [(holder, key) for key in keys]
            left += [holder[key] for key in keys]
    return found
