"""The tensors of a conversion as floats again, block by block.

Owns what a tensor's bytes become: int8 data times its step with the stored columns put back, floats cast to another
dtype, everything else as it is. Knows no output file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from int8cli.checkpoint.tensor import QUANTIZABLE_DTYPES, TORCH_NAMES, TensorSpec
from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES
from int8cli.errors import CheckpointError
from int8cli.llm_int8.baselines import restored_weight
from int8cli.llm_int8.limits import Steps
from int8cli.llm_int8.scales import scaled
from int8cli.runtime.converted_tensors import ConvertedTensors, Exponents

_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class FloatTensor:
    """A tensor of the output. `quantized`: it is int8 in the conversion; `transpose`: it is (out, in) there.

    One of fused experts consists of `parts`, by expert: the parts of an expert stand one after the other or, if they
    are to be transposed, side by side.
    """

    spec: TensorSpec
    quantized: bool
    transpose: bool = False
    parts: tuple[tuple["FloatTensor", ...], ...] = ()

    @property
    def int8_tensors(self) -> int:
        """How many tensors it is in the conversion that are int8."""
        parts = [part for expert in self.parts for part in expert]
        return sum(part.quantized for part in parts) if parts else int(self.quantized)


def float_blocks(tensors: ConvertedTensors, wanted: FloatTensor) -> Iterator[Tensor]:
    """The tensor's values in row-major order, in pieces of its dtype. Each is to be used before the next is asked for.

    A weight is the one that `load_model` computes with: data * row_absmax / 127, and in the stored columns the source's
    own values. A smoothing is undone in all tensors: bit for bit where it was by powers of two, else to the nearest
    value of the dtype. Raises CheckpointError for a value that the dtype cannot hold, and what reading raises.
    """
    if wanted.parts:
        return _fused_blocks(tensors, wanted)
    if wanted.quantized:
        return _restored_blocks(tensors, wanted)
    if wanted.transpose:
        return _columns_of(tensors, wanted)
    dtype = TORCH_DTYPES[wanted.spec.dtype]
    return (_cast(block, dtype, wanted.spec) for block in _flat_blocks(tensors, wanted.spec.name))


def _fused_blocks(tensors: ConvertedTensors, wanted: FloatTensor) -> Iterator[Tensor]:
    """Fused experts, from the blocks of their parts."""
    for expert in wanted.parts:
        blocks = [float_blocks(tensors, part) for part in expert]
        if expert[0].transpose:
            yield from (torch.cat(rows, dim=1) for rows in zip(*blocks, strict=True))
        else:
            yield from chain.from_iterable(blocks)


def _restored_blocks(tensors: ConvertedTensors, wanted: FloatTensor) -> Iterator[Tensor]:
    """An int8 weight, in blocks of its rows as the output has them."""
    dtype = TORCH_DTYPES[wanted.spec.dtype]
    exponents = tensors.exponents(wanted.spec.name)
    module = wanted.spec.name.removesuffix(".weight")
    row_absmax, exact = tensors.row_absmax(module), tensors.exact_columns(module)
    if wanted.transpose:
        yield from _transposed_blocks(tensors, wanted, row_absmax, exponents)
        return
    start = 0
    for data in tensors.row_blocks(wanted.spec.name, _BLOCK_ELEMENTS):
        part = slice(start, start + data.shape[0])
        block = restored_weight(data, row_absmax[part], torch.float32)
        if exact is not None:
            block.index_copy_(1, exact.columns, exact.weight[part].float())
        rows = None if exponents.rows is None else exponents.rows[part]
        yield _cast(_undone(block, exponents.steps, rows, exponents.columns), dtype, wanted.spec)
        start = part.stop


def _undone(block: Tensor, steps: Steps, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """A block of float32 (rows, columns) without the smoothing."""
    if rows is None and columns is None:
        return block
    return scaled(block, steps, rows=rows, columns=columns, undo=True)


def _transposed_blocks(
    tensors: ConvertedTensors, wanted: FloatTensor, row_absmax: Tensor, exponents: Exponents
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
        columns = None if exponents.columns is None else exponents.columns[start : start + block.shape[1]]
        block = _undone(block, exponents.steps, exponents.rows, columns)
        yield _cast(block.t().contiguous(), TORCH_DTYPES[wanted.spec.dtype], wanted.spec)


def _columns_of(tensors: ConvertedTensors, wanted: FloatTensor) -> Iterator[Tensor]:
    """A matrix of floats (out, in) in blocks of its columns, as many as `_transposed_blocks` has in one."""
    matrix = tensors.map(wanted.spec.name)
    step = max(1, _BLOCK_ELEMENTS // max(1, matrix.shape[0]))
    for start in range(0, matrix.shape[1], step):
        block = matrix[:, start : start + step].t().contiguous()
        yield _cast(block, TORCH_DTYPES[wanted.spec.dtype], wanted.spec)


def _flat_blocks(tensors: ConvertedTensors, name: str) -> Iterator[Tensor]:
    flat, exponents = tensors.map(name).reshape(-1), tensors.exponents(name)
    for start in range(0, flat.numel(), _BLOCK_ELEMENTS):
        block = flat[start : start + _BLOCK_ELEMENTS]
        if exponents.rows is not None:
            rows = exponents.rows[start : start + _BLOCK_ELEMENTS]
            block = scaled(block[:, None], exponents.steps, rows=rows, undo=True)[:, 0]
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
