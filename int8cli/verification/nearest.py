"""Checks that the floats of a finely smoothed conversion are the values nearest to what the source divides to.

Owns that check, which divides nothing and rounds nothing: of a value and its two neighbours in the dtype, the one that
is written must be the nearest once it is multiplied by its scale, and of two that are as near the even one.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from int8cli.checkpoint.reader import FileReader, ShardReader
from int8cli.checkpoint.tensor import StoredTensor
from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES
from int8cli.llm_int8.limits import EXACT_STEPS, Steps
from int8cli.llm_int8.scales import scales
from int8cli.planning.planned_shard import PlannedShard
from int8cli.results.verification import Failure

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def rounded_vectors(planned: PlannedShard) -> tuple[str, ...]:
    """The tensors of a shard that stay floats, in their own dtype, and are divided by scales that round them."""
    found = []
    for name, exponents in planned.exponents.items():
        if exponents.steps == EXACT_STEPS or planned.decisions[name].quantize:
            continue
        stored = _stored(planned, name)
        if stored.scaled is None and planned.output.tensors[name].spec.dtype == stored.file_dtype:
            found.append(name)
    return tuple(found)


def not_nearest(planned: PlannedShard, source: ShardReader, written: Path) -> Iterator[Failure]:
    """The tensors with a value that is not the nearest, with the place of the first."""
    with closing(FileReader(written)) as reader:
        for name in rounded_vectors(planned):
            before, place = _stored(planned, name), planned.output.tensors[name]
            found = _values(reader, place.offset_bytes, place)
            exponents = torch.frombuffer(bytearray(planned.exponents[name].rows), dtype=torch.int8)
            wrong = ~is_nearest(
                _values(source, before.offset_bytes, before), found, exponents, planned.exponents[name].steps
            )
            if bool(wrong.any()):
                first = int(wrong.nonzero()[0])
                yield Failure(planned.output.file_name, f"[{first}] is not the nearest to the source's by scale", name)


def _stored(planned: PlannedShard, name: str) -> StoredTensor:
    return next(stored for stored in planned.contents.tensors if stored.spec.name == name)


def _values(reader: ShardReader, offset_bytes: int, tensor: StoredTensor) -> Tensor:
    """A tensor of a file, flat. A vector is small."""
    dtype = TORCH_DTYPES[tensor.file_dtype]
    data = bytearray(tensor.spec.numel * dtype.itemsize)
    reader.read_into(offset_bytes, memoryview(data))
    return torch.frombuffer(data, dtype=dtype)


def is_nearest(before: Tensor, after: Tensor, exponents: Tensor, steps: Steps) -> Tensor:
    """Whether no neighbour of a value in `after` is nearer to `before` divided by s(-exponents): bool (elements,).

    All are exact in float64: a value of at most 24 bits times a scale of 13, and the difference of near values.
    """
    factors, exact = scales(-exponents, steps).double(), before.double()
    bits = after.view(_BITS[after.dtype.itemsize])
    error = (exact - after.double() * factors).abs()
    right = torch.signbit(after) == torch.signbit(before)
    for step in (-1, 1):
        beside = (bits + step).view(after.dtype)  # the next smaller or larger magnitude; below 0 there is NaN
        other = (exact - beside.double() * factors).abs()
        right &= (error < other) | other.isnan() | ((error == other) & (bits % 2 == 0))
    unchanged = (after == before) | (after.isnan() & before.isnan())
    return torch.where(torch.isfinite(before), right & torch.isfinite(after), unchanged)
