"""The integer product on a processor, for few tokens in the way that is fastest there.

Owns which of torch's ways is taken. All give the same integers, so that a choice by the clock changes no result.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Of more tokens the first way is the fastest or nearly so: a 512-token product costs twice as much the other way round
# on some processors.
_FEW_TOKENS = 32
_FEWER_TOKENS = 8  # so many products of one token may be faster than one product
_ROUNDS = 3
_ALIASING_BYTES = 1024
_GAP_BYTES = 64


def laid_out(data: Tensor) -> Tensor:
    """The weight (out, in) in the layout that products on a processor are fastest with, copied if that is another.

    Rows that begin a multiple of 1024 bytes apart fall into the same few sets of the cache, where oneDNN packs columns
    of them: 8 tokens by 2048 x 2048 took 0.92 ms, and 0.32 ms with gaps of 64 bytes between the rows.
    """
    if data.device.type != "cpu" or data.shape[1] % _ALIASING_BYTES or data.shape[0] < 2:
        return data
    room = torch.empty(data.shape[0], data.shape[1] + _GAP_BYTES, dtype=torch.int8)
    return room[:, : data.shape[1]].copy_(data)


def has_whole_rows(data: Tensor) -> bool:
    """Whether each row is contiguous and follows the row before it. There may be a gap between rows."""
    return data.shape[0] > 1 and data.stride(1) == 1 and data.stride(0) >= data.shape[1] > 1


def cpu_product(left: Tensor, right: Tensor) -> Tensor:
    """left (tokens, in) times right (out, in) transposed, int8, rows in one piece each: exact, int32 (tokens, out).

    The first product of a shape with few tokens is timed in each way. Which one wins depends on the processor and on
    the width: oneDNN packs its right side anew in each call, and packing a width of 2048 takes ten times as long as the
    product of one token, which needs none.
    """
    tokens = left.shape[0]
    if not 2 <= tokens <= _FEW_TOKENS or torch.compiler.is_compiling():
        return by_tokens(left, right)
    return _way_for(left, right)(left, right)


def by_tokens(left: Tensor, right: Tensor) -> Tensor:
    return torch._int_mm(left, right.t())


def by_outputs(left: Tensor, right: Tensor) -> Tensor:
    """The product the other way round: the tokens are what is packed."""
    return torch._int_mm(right, left.t()).t()


def one_by_one(left: Tensor, right: Tensor) -> Tensor:
    return torch.cat([torch._int_mm(token, right.t()) for token in torch.split(left, 1)])


Way = Callable[[Tensor, Tensor], Tensor]
WAYS: tuple[Way, ...] = (by_tokens, by_outputs, one_by_one)
_chosen: dict[tuple[Any, ...], Way] = {}


def _way_for(left: Tensor, right: Tensor) -> Way:
    key = (*left.shape, right.shape[0], torch.get_num_threads())
    if key not in _chosen:
        ways = WAYS if left.shape[0] <= _FEWER_TOKENS else WAYS[:2]
        _chosen[key] = min(ways, key=lambda way: _seconds(way, left, right))
    return _chosen[key]


def _seconds(way: Way, left: Tensor, right: Tensor) -> float:
    """The shortest of some runs; the first of a shape, in which oneDNN makes its code, is not counted."""
    way(left, right)
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        way(left, right)
        times.append(time.perf_counter() - begin)
    return min(times)
