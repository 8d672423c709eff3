"""A tensor that an output keeps as it is in its source, cast or divided by scales: compared with the source's bytes.

Owns what of it is compared, and how a difference is worded.
"""

import torch
from torch import Tensor

from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES
from int8cli.verification.definition import scaled
from int8cli.verification.int8_layer import scales_beside
from int8cli.verification.tensor_file import TensorFile

_PIECE_BYTES = 1 << 20
_PIECES = 2  # of one tensor: its beginning and its end


def copy_problem(
    source: TensorFile, name: str, output: TensorFile, written: str, sidecar: TensorFile | None
) -> str | None:
    """How the tensor `written` of the output differs from `name` of the source; None if it does not."""
    if source.shape(name) != output.shape(written):
        return f"is {list(output.shape(written))}, the source has {list(source.shape(name))}"
    rows = scales_beside(sidecar, written, "smooth_row", -1)
    if source.dtype(name) == output.dtype(written) and rows is None:
        size = source.size_bytes(name)
        for first, end in _pieces(size, _PIECE_BYTES):
            if source.raw(name, first, end) != output.raw(written, first, end):
                return "differs from the source"
        return None
    if not {source.dtype(name), output.dtype(written)} <= TORCH_DTYPES.keys():
        return None
    count = output.size_bytes(written) // TORCH_DTYPES[output.dtype(written)].itemsize
    for first, end in _pieces(count, _PIECE_BYTES // 4):
        values = source.elements(name, first, end)
        if rows is not None:
            values = scaled(values, rows=rows[first:end])
        due, found = values.to(TORCH_DTYPES[output.dtype(written)]), output.elements(written, first, end)
        if not _is_same(due, found):
            how = "the source's, cast" if rows is None else "the source's divided by its scales"
            return f"is not {how}"
    return None


def _is_same(due: Tensor, found: Tensor) -> bool:
    """Whether the bits are the same, but for those of NaN."""
    if torch.equal(due.view(torch.uint8), found.view(torch.uint8)):
        return True
    one, other = due.float(), found.float()
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _pieces(size: int, piece: int) -> list[tuple[int, int]]:
    """The whole, or its beginning and its end."""
    if size <= _PIECES * piece:
        return [(0, size)]
    return [(0, piece), (size - piece, size)]
