"""Our reader of safetensors headers and the package's own over the same files: valid ones, and others near to them.

`header_judge` says what may differ. The fuzzer of the same reader (`formats`) goes by coverage; this goes by volume.
"""

import json
import time
from random import Random
from typing import Any

from int8cli.checkpoint.tensor import DTYPE_BITS
from int8cli.errors import CheckpointError
from torture import Figures
from torture.fuzzing import WrongResultError
from torture.fuzzing.mutations import change_bytes
from torture.header_judge import compare_with_safetensors

_STRANGE = (
    *("0", "1", "-0", "-1", "00", "1.0", "1e0", "18446744073709551615", "18446744073709551616", "NaN", "null", "true"),
    *("[]", "{}", "[0]", '""', '"F32"', '"f32"', '"\\u0046\\u0033\\u0032"', '"\\ud800"', '"dtype"', '"a"', "\ufeff"),
    *(",", ":", "{", "}", "[", "]", " ", "\n", "\u00a0", "//", '"a":1,', '"shape":[],', '"__metadata__":{},', ""),
)


def run(seconds: float, seed: int) -> Figures:
    begun, random = time.monotonic(), Random(seed)
    read = refused = 0
    found: list[str] = []
    while time.monotonic() - begun < seconds:
        content = _file(random)
        try:
            compare_with_safetensors(content)
            read += 1
        except CheckpointError:
            refused += 1
        except WrongResultError as error:
            found.append(f"{content!r:.2000} {error}")
    measured = (("read by both", f"{read:,}"), ("refused", f"{refused:,}"))
    return Figures("headers", read + refused + len(found), len(found), time.monotonic() - begun, tuple(found), measured)


def _file(random: Random) -> bytes:
    """A valid file, or one that was changed in a token of its header, in a byte, or in its length."""
    text, data = _valid(random)
    what = random.random()
    if what < 0.6:
        tokens = _tokens(text)
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            place = random.randrange(len(tokens))
            tokens[place : place + random.randrange(2)] = [random.choice((*_STRANGE, random.choice(tokens)))]
        text = "".join(tokens)
    encoded = text.encode("utf-8", "surrogatepass")
    content = len(encoded).to_bytes(8, "little") + encoded + data
    if what > 0.9:
        return change_bytes(random, content, b"")
    return content[: random.randrange(len(content))] if what > 0.87 else content


def _valid(random: Random) -> tuple[str, bytes]:
    """A header of a few tensors of any dtype and shape, in any order, and as much data."""
    header: dict[str, Any] = {}
    end = 0
    for place in range(random.randrange(5)):
        dtype = random.choice(list(DTYPE_BITS))
        shape = [random.choice((0, 1, 2, 3, 8)) for _ in range(random.randrange(4))]
        bits = DTYPE_BITS[dtype]
        for extent in shape:
            bits *= extent
        if bits % 8:
            shape, bits = [*shape, 8], bits * 8
        name = random.choice(("a", "dtype", "shape", "größe", '"', "x.y", "")) + str(place)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]}
        end += bits // 8
    entries = list(header.items())
    random.shuffle(entries)
    metadata = {"__metadata__": {"format": "pt", "ü": ""}} if random.random() < 0.5 else {}
    text = json.dumps({**metadata, **dict(entries)}, ensure_ascii=random.random() < 0.5)
    return text + " " * random.choice((0, -len(text.encode()) % 8)), random.randbytes(end)


def _tokens(text: str) -> list[str]:
    """The header in its tokens; joined they are the header."""
    found: list[str] = []
    for character in text:
        joins = (
            found and (character.isalnum() or character in "_.") and (found[-1][-1].isalnum() or found[-1][-1] in "_.")
        )
        if joins:
            found[-1] += character
        else:
            found.append(character)
    return found
