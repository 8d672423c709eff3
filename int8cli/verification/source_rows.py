"""Rows of a linear weight as the method takes them, (rows, in_features), read from the source.

Owns which rectangle of a file's tensor they are, worked out from shapes and names without the conversion's plan: a
weight may be stored transposed, and be one of fused experts.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from int8cli.checkpoint.tensor import StoredTensor
from int8cli.conversion.buffers import CrosswiseTiles, Workbench
from int8cli.conversion.open_shard import OpenShard
from int8cli.conversion.task import ShardTask
from int8cli.llm_int8.quantize import BlockQuantizer
from int8cli.planning.blocks import BLOCK_ELEMENTS, Matrix, Rectangle
from int8cli.records.shard_record import ShardRecord
from int8cli.verification.tensor_file import TensorFile

FloatRows = Callable[[int, int], Tensor]  # of a weight's rows [first, end): (end - first, in_features)

_EXPERT = re.compile(r"(?:^|\.)experts\.(?P<number>\d+)\.(?P<matrix>\w+)\.weight$")
_SECOND_HALVES = frozenset({"up_proj", "w3"})  # of what gate and up are together


def readings(file: TensorFile, stored: StoredTensor, shape: tuple[int, int], *, turned: bool | None) -> list[FloatRows]:
    """The ways to read the rows of a weight from a file: one, or both orders of a matrix whose shape fits both.

    `stored` names the tensor and that of the file, `shape` is (out_features, in_features). A tensor that is a square
    matrix is `turned` or not, None if that is not known. Empty if the tensor of the file does not fit.
    """
    name, inside = (stored.whole or stored).spec.name, _EXPERT.search(stored.spec.name)
    *leading, height, width = file.shape(name)
    out_features, in_features = shape
    fused = bool(leading) and inside is not None
    number = int(inside["number"]) if fused and inside is not None else 0
    parts = height * width // max(1, out_features * in_features)
    second = inside is not None and inside["matrix"] in _SECOND_HALVES
    start = out_features if fused and parts == 2 and second else 0
    known = turned if not leading and height == width else None
    ways: list[FloatRows] = []
    if (height, width) == (parts * out_features, in_features) and known is not True:
        ways.append(partial(_rows, file, name, number, start, in_features))
    if (height, width) == (in_features, parts * out_features) and known is not False:
        ways.append(partial(_columns, file, name, number, start, in_features))
    return ways


def _rows(file: TensorFile, name: str, number: int, start: int, in_features: int, first: int, end: int) -> Tensor:
    return file.rectangle(name, number, (start + first, start + end), (0, in_features))


def _columns(file: TensorFile, name: str, number: int, start: int, in_features: int, first: int, end: int) -> Tensor:
    return file.rectangle(name, number, (0, in_features), (start + first, start + end)).t().contiguous()


def workbench(task: ShardTask, shard: OpenShard) -> Workbench:
    """What `reading_as_converted` reads with."""
    return Workbench(shard.reader, task.planned.contents, CrosswiseTiles(shard.reader), BlockQuantizer(1))


def reading_as_converted(task: ShardTask, bench: Workbench, stored: StoredTensor) -> FloatRows:
    """The rows as the conversion reads them: for pickled files, and for 8-bit floats with scales."""
    matrix = Matrix.of(stored, transpose=task.planned.decisions[stored.spec.name].transpose)
    width = matrix.in_features
    height = max(1, BLOCK_ELEMENTS // max(1, width))

    def rows(first: int, end: int) -> Tensor:
        parts = (Rectangle(row, min(height, end - row), 0, width) for row in range(first, end, height))
        if width <= BLOCK_ELEMENTS:
            return torch.cat([bench.load(matrix, part).clone() for part in parts])
        pieces = (piece for row in range(first, end) for piece in matrix.row_pieces(row))
        return torch.cat([bench.load(matrix, piece).flatten().clone() for piece in pieces]).view(end - first, width)

    return rows


def orders_by_block(records: Iterable[ShardRecord]) -> dict[str, bool | None]:
    """Whether the weights of a block were stored transposed, as those that are not square show; None if they differ."""
    found: dict[str, bool | None] = {}
    for record in records:
        shapes = {spec.name: spec.shape for spec in record.source_tensors}
        for layer in record.layers:
            shape, block = shapes.get(f"{layer.name}.weight"), block_of(layer.name)
            if shape is not None and len(shape) == 2 and shape[0] != shape[1]:
                turned = shape != layer.shape
                found[block] = turned if found.get(block, turned) is turned else None
    return found


def block_of(name: str) -> str:
    """The name up to its last number; empty if it has none."""
    parts = name.split(".")
    return ".".join(parts[: max((place + 1 for place, part in enumerate(parts) if part.isdigit()), default=0)])
