"""Exponents with a smaller expected error: columns are moved one after the other while that makes it smaller."""

import torch
from torch import Tensor

from int8cli.llm_int8.expected_error import ExpectedError, ExpectedErrorState
from int8cli.llm_int8.smoothing import ExponentRange

# Sweeps over the columns, at most. The error falls by 25 % in the first and by 5 % in all that follow.
_SWEEPS = 4
# A sweep that changes fewer columns than one in so many is the last.
_SETTLED = 100
_TILE_COLUMNS = 64
_TILE_ELEMENTS = 1 << 21


def descended(expected: ExpectedError, exponents: Tensor, allowed: ExponentRange) -> Tensor:
    """Exponents with a smaller error, or these: int8 (in_features,).

    Begins with `exponents`, which must be `allowed`. One column after the other is moved by a factor of 2 if that makes
    the error smaller, and then, if there are finer steps, by one step.
    """
    state, group = expected.state(exponents), expected.group
    limits = allowed if group is None else _narrowest(allowed, group, expected.columns)
    tile = max(1, min(_TILE_COLUMNS, _TILE_ELEMENTS // max(1, expected.longest)))
    for stride in sorted({expected.steps, 1}, reverse=True):
        _sweep(state, limits, stride, tile)
    found = state.exponents.to(torch.int8)
    return found if group is None else found[group]


def _sweep(state: ExpectedErrorState, limits: ExponentRange, stride: int, tile: int) -> None:
    """Move columns by `stride` steps, down or up, until few move."""
    size = state.exponents.numel()
    for _ in range(_SWEEPS):
        moved = 0
        for start in range(0, size, tile):
            columns = slice(start, min(size, start + tile))
            now = state.exponents[columns]
            fits = torch.stack([now - stride >= limits.lowest[columns], now + stride <= limits.highest[columns]])
            for column, step in state.promising(columns, fits, stride):
                moved += state.tried(column, step)
        if moved * _SETTLED < size:
            break


def _narrowest(allowed: ExponentRange, group: Tensor, count: int) -> ExponentRange:
    """What is allowed in every column of each group."""
    whole = ExponentRange.unlimited(count, group.device)
    lowest = whole.lowest.scatter_reduce(0, group, allowed.lowest, "amax")
    return ExponentRange(lowest, whole.highest.scatter_reduce(0, group, allowed.highest, "amin"))
