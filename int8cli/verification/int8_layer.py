"""One int8 layer of an output, compared with the definition of the method on rows of its source.

Owns how data, scales and stored columns lie in the files of each layout, and how a difference is worded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int8cli.verification.definition import int8_rows, scaled, scales
from int8cli.verification.source_rows import FloatRows
from int8cli.verification.tensor_file import TensorFile

MOST_ELEMENTS = 1 << 22  # of one tensor: whole ones of up to 2,048 x 2,048, and some rows of larger ones
PIECE_ELEMENTS = 1 << 17  # of one computation: stays in the cache
_RUNS = 8


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the settings say of all layers: float32 goes through float16; float16 is cast to bfloat16 before."""

    float32_via_half: bool
    cast_to_bfloat16: bool


class Int8Layer:
    """The layer `name` in the files of an output: (out_features, in_features)."""

    def __init__(self, name: str, shape: tuple[int, int], output: TensorFile, sidecar: TensorFile | None) -> None:
        self.name, self.shape = name, shape
        self._output, self._sidecar = output, sidecar
        self._packed = f"{name}.weight_packed" in output
        as_absmax = f"{name}.SCB" in output
        self._scales = f"{name}.SCB" if as_absmax else f"{name}.weight_scale"
        self._as_absmax = as_absmax
        self._of_columns = scales_beside(sidecar, name, "smooth", 1)
        self._of_rows = scales_beside(sidecar, f"{name}.weight", "smooth_row", -1)
        columns = self._beside(f"{name}.outlier_cols")
        self._columns = torch.empty(0, dtype=torch.int64) if columns is None else columns.long()

    def problem(self, read: FloatRows, conditions: Conditions) -> str | None:
        """How the layer differs from the weight whose rows `read` gives, on the rows compared; None if it does not."""
        out_features, in_features = self.shape
        for first, end in runs(out_features, in_features):
            found = self._problem_of(self._smoothed(read(first, end), first, end), first, end, conditions)
            if found is not None:
                return found
        return None

    def _problem_of(self, weight: Tensor, first: int, end: int, conditions: Conditions) -> str | None:
        columns = len(self._columns)
        if columns:
            stored = self._sidecar_rows(first, end, columns)
            if not _same_bits(stored, weight[:, self._columns]):
                return f"its stored columns are not the source's in rows {first:,} to {end - 1:,}"
        goes_through_half = weight.dtype == torch.float16 or conditions.float32_via_half
        if conditions.cast_to_bfloat16 and goes_through_half:
            weight = weight.bfloat16()
        wanted = int8_rows(weight, float32_via_half=conditions.float32_via_half)
        due, scales = wanted.row_absmax if self._as_absmax else wanted.step, self._scale_rows(first, end)
        if not _same_bits(scales, due):
            row = _first(scales != due)[0]
            return f"row {first + row:,} has the scale {scales[row]:.9g}, by the method's definition {due[row]:.9g}"
        data = self._data_rows(first, end)
        if not torch.equal(data, wanted.data):
            row, column = _first(data != wanted.data)
            was, is_due = int(data[row, column]), int(wanted.data[row, column])
            return f"[{first + row}, {column}] is {was}, by the method's definition {is_due}"
        return None

    def _smoothed(self, weight: Tensor, first: int, end: int) -> Tensor:
        if self._of_columns is None and self._of_rows is None:
            return weight
        rows = None if self._of_rows is None else self._of_rows[first:end, None]
        return scaled(weight, columns=self._of_columns, rows=rows)

    def _data_rows(self, first: int, end: int) -> Tensor:
        width = self.shape[1]
        if not self._packed:
            return self._output.elements(f"{self.name}.weight", first * width, end * width).view(-1, width)
        data = self._output.raw(f"{self.name}.weight_packed", first * width, end * width)
        unsigned = torch.frombuffer(data, dtype=torch.uint8).to(torch.int16)
        return (unsigned - 128).to(torch.int8).view(-1, width)

    def _scale_rows(self, first: int, end: int) -> Tensor:
        return self._output.elements(self._scales, first, end)

    def _sidecar_rows(self, first: int, end: int, columns: int) -> Tensor:
        assert self._sidecar is not None
        found = self._sidecar.elements(f"{self.name}.outlier_weight", first * columns, end * columns)
        return found.view(-1, columns)

    def _beside(self, name: str) -> Tensor | None:
        if self._sidecar is None or name not in self._sidecar:
            return None
        return self._sidecar.elements(name, 0, self._sidecar.shape(name)[0])


def scales_beside(sidecar: TensorFile | None, tensor: str, kind: str, sign: int) -> Tensor | None:
    """What a sidecar has as exponents of this tensor stands for, their sign changed by `sign`; None without them."""
    for name, steps in ((f"{tensor}.{kind}_exponents", 1), (f"{tensor}.{kind}_quarter_exponents", 4)):
        if sidecar is not None and name in sidecar:
            exponents = sidecar.elements(name, 0, sidecar.shape(name)[0])
            return scales(sign * exponents.to(torch.int16), steps)
    return None


def runs(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Runs [first, end) of rows, of at most MOST_ELEMENTS together: all rows, or runs spread from first to last.

    One has PIECE_ELEMENTS at most, or is one row.
    """
    most = max(_RUNS, MOST_ELEMENTS // max(1, width))
    each = rows if rows <= most else most // _RUNS
    starts = [0] if rows <= most else [(rows - each) * place // (_RUNS - 1) for place in range(_RUNS)]
    height = max(1, PIECE_ELEMENTS // max(1, width))
    for start in starts:
        for first in range(start, start + each, height):
            yield first, min(first + height, start + each)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def _first(differs: Tensor) -> Sequence[int]:
    """The index of the first element that is true."""
    place: Sequence[int] = differs.nonzero()[0].tolist()
    return place
