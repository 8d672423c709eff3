"""The tensors of a conversion as floats again, block by block.

Owns what a tensor's bytes become: int8 data times its step with the stored columns put back, floats cast to another
dtype, everything else as it is. Knows no output file.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from int8cli.checkpoint.tensor import QUANTIZABLE_DTYPES, TORCH_NAMES, TensorSpec
from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES
from int8cli.errors import CheckpointError
from int8cli.llm_int8.baselines import restored_weight
from int8cli.llm_int8.smoothing import powers_of_two
from int8cli.runtime.converted import ConvertedTensors

_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class FloatTensor:
    """A tensor of the output. `quantized`: it is int8 in the conversion; `transpose`: and (out, in) there."""

    spec: TensorSpec
    quantized: bool
    transpose: bool = False


def float_blocks(tensors: ConvertedTensors, wanted: FloatTensor) -> Iterator[Tensor]:
    """The tensor's values in row-major order, in pieces of its dtype. Each is to be used before the next is asked for.

    A weight is the one that `load_model` computes with: data * row_absmax / 127, and in the stored columns the source's
    own values. A smoothing is undone in all tensors. Raises CheckpointError for a value that the dtype cannot hold, and
    what reading raises.
    """
    dtype = TORCH_DTYPES[wanted.spec.dtype]
    if not wanted.quantized:
        yield from (_cast(block, dtype, wanted.spec) for block in _flat_blocks(tensors, wanted.spec.name))
        return
    rows, columns = tensors.exponents(wanted.spec.name)
    module = wanted.spec.name.removesuffix(".weight")
    row_absmax, exact = tensors.row_absmax(module), tensors.exact_columns(module)
    if not wanted.transpose:
        start = 0
        for data in tensors.row_blocks(wanted.spec.name, _BLOCK_ELEMENTS):
            part = slice(start, start + data.shape[0])
            block = restored_weight(data, row_absmax[part], torch.float32)
            if exact is not None:
                block.index_copy_(1, exact.columns, exact.weight[part].float())
            _undo(block, None if rows is None else rows[part], columns)
            yield _cast(block, dtype, wanted.spec)
            start = part.stop
        return
    yield from _transposed_blocks(tensors, wanted, row_absmax, rows, columns)


def _undo(block: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    """Undo a smoothing in a block of float32 (rows, columns), in place."""
    if rows is not None:
        block *= powers_of_two(-rows, block.dtype)[:, None]
    if columns is not None:
        block *= powers_of_two(-columns, block.dtype)


def _transposed_blocks(
    tensors: ConvertedTensors, wanted: FloatTensor, row_absmax: Tensor, rows: Tensor | None, columns: Tensor | None
) -> Iterator[Tensor]:
    """Blocks of input columns, from a mapping of the data: (columns, out_features) each."""
    module, name = wanted.spec.name.removesuffix(".weight"), wanted.spec.name
    exact, data = tensors.exact_columns(module), tensors.map_stored(name)  # (out, in)
    step = max(1, _BLOCK_ELEMENTS // max(1, data.shape[0]))
    places = {} if exact is None else {column: place for place, column in enumerate(exact.columns.tolist())}
    for start in range(0, data.shape[1], step):
        block = restored_weight(data[:, start : start + step], row_absmax, torch.float32)
        for column in range(start, start + block.shape[1]):
            if exact is not None and column in places:
                block[:, column - start] = exact.weight[:, places[column]].float()
        _undo(block, rows, None if columns is None else columns[start : start + block.shape[1]])
        yield _cast(block.t().contiguous(), TORCH_DTYPES[wanted.spec.dtype], wanted.spec)


def _flat_blocks(tensors: ConvertedTensors, name: str) -> Iterator[Tensor]:
    flat, (exponents, _) = tensors.map(name).reshape(-1), tensors.exponents(name)
    for start in range(0, flat.numel(), _BLOCK_ELEMENTS):
        block = flat[start : start + _BLOCK_ELEMENTS]
        if exponents is not None:
            block = block * powers_of_two(-exponents[start : start + _BLOCK_ELEMENTS], block.dtype)
        yield block


def _cast(block: Tensor, dtype: torch.dtype, spec: TensorSpec) -> Tensor:
    if block.dtype == dtype:
        return block.contiguous()
    result = block.to(dtype)
    if bool((torch.isinf(result) & torch.isfinite(block)).any()):
        raise CheckpointError(
            f"{spec.name} has the value {float(block.abs().amax()):.3g}, which {TORCH_NAMES[spec.dtype]} cannot hold",
            hint="bfloat16 and float32 can.",
        )
    return result


def written_spec(source: TensorSpec, dtype: str | None) -> TensorSpec:
    """How a tensor of the source is written: in its own dtype, floats in `dtype` where that is given."""
    if dtype is None or source.dtype not in QUANTIZABLE_DTYPES:
        return source
    return TensorSpec(source.name, dtype, source.shape)
