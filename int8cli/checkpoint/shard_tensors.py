"""The tensors of one shard file on this machine, by name, as torch tensors.

Owns how the bytes of a stored tensor become a tensor, in either orientation, and codes with scales the floats that they
stand for. Knows no source and no model.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from int8cli.checkpoint.disk import reading_errors
from int8cli.checkpoint.pickled import load_legacy
from int8cli.checkpoint.reader import FileReader, TensorsReader
from int8cli.checkpoint.scaled_floats import ScaledFloats
from int8cli.checkpoint.tensor import ShardContents, StoredTensor
from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES
from int8cli.errors import CheckpointError

_SCALED_ELEMENTS = 1 << 19


class ShardTensors:
    """The tensors of one shard file on this machine, read or mapped by name. Must be closed."""

    def __init__(self, path: Path, contents: ShardContents) -> None:
        self._path = path
        self._contents = contents
        self._places = {stored.spec.name: stored for stored in contents.tensors}
        self._legacy = None if contents.mappable else load_legacy(path)
        self._reader = FileReader(path) if contents.mappable else None

    def read(self, name: str) -> Tensor:
        """A contiguous copy of the tensor in memory."""
        stored = self._places[name]
        return self._read_stored(stored) if stored.scaled is None else self._read_scaled(stored)

    def _read_scaled(self, stored: StoredTensor) -> Tensor:
        """The floats that a tensor's codes stand for."""
        assert stored.scaled is not None
        if stored.spec.numel and not (stored.column_major or stored.scaled.turned):
            result = torch.empty(stored.spec.shape, dtype=TORCH_DTYPES[stored.spec.dtype])
            rows, start = result.view(-1, stored.spec.shape[-1]), 0
            for block in self._scaled_blocks(stored, _SCALED_ELEMENTS):
                rows[start : start + block.shape[0]].copy_(block)
                start += block.shape[0]
            return result
        codes = self._read_stored(stored)
        return self._decoder().floats(stored, codes, 0, 0, turned=stored.scaled.turned).clone()

    def _scaled_blocks(self, stored: StoredTensor, elements: int) -> Iterator[Tensor]:
        """The floats of a tensor in blocks of whole rows, of all its matrices. A block reuses the last's memory."""
        decoder, row = self._decoder(), 0
        for codes in self._stored_blocks(stored, elements):
            yield decoder.floats(stored, codes, row, 0)
            row += codes.shape[0]

    def _decoder(self) -> ScaledFloats:
        if self._legacy is not None:
            tensors = [self._legacy[each.spec.name] for each in self._contents.as_in_file().tensors]
            return ScaledFloats(TensorsReader(tensors), self._contents)
        assert self._reader is not None
        return ScaledFloats(self._reader, self._contents)

    def _read_stored(self, stored: StoredTensor) -> Tensor:
        """A contiguous copy of the tensor as the file has it."""
        if self._legacy is not None:
            return self._legacy[stored.spec.name].contiguous()
        if not stored.spec.numel:
            return torch.empty(stored.spec.shape, dtype=_dtype_of(stored))
        assert self._reader is not None
        memory = bytearray(stored.span_bytes)
        self._reader.read_into(stored.offset_bytes, memoryview(memory))
        return _as_stored(torch.frombuffer(memory, dtype=torch.uint8), stored)

    def row_blocks(self, name: str, elements: int) -> Iterator[Tensor]:
        """A matrix in blocks of whole rows with about `elements` elements. A block may reuse the memory of the last."""
        stored = self._places[name]
        if stored.column_major:
            matrix, step = self.map(name), max(1, elements // max(1, stored.spec.shape[1]))
            yield from (matrix[start : start + step] for start in range(0, matrix.shape[0], step))
        elif stored.scaled is not None:
            yield from self._scaled_blocks(stored, elements)
        else:
            yield from self._stored_blocks(stored, elements)

    def _stored_blocks(self, stored: StoredTensor, elements: int) -> Iterator[Tensor]:
        """A row-major tensor as the file has it, in blocks of whole rows, those of all its matrices."""
        columns = stored.spec.shape[-1]
        rows = stored.spec.numel // max(1, columns)
        step = max(1, elements // max(1, columns))
        if self._reader is None:
            matrix = self._read_stored(stored).view(rows, columns)
            yield from (matrix[start : start + step] for start in range(0, rows, step))
            return
        row_bytes = stored.file_nbytes // max(1, rows)
        memory = bytearray(step * row_bytes)
        block = torch.frombuffer(memory, dtype=_dtype_of(stored)).view(step, columns) if memory else None
        for start in range(0, rows if block is not None else 0, step):
            count = min(step, rows - start)
            self._reader.read_into(stored.offset_bytes + start * row_bytes, memoryview(memory)[: count * row_bytes])
            assert block is not None
            yield block[:count]

    def map(self, name: str) -> Tensor:
        """The tensor as a mapping of its file, which stays valid after `close`. Do not write to it.

        A scaled one is in memory: its floats are in no file.
        """
        stored = self._places[name]
        if self._legacy is not None or stored.scaled is not None or not stored.spec.nbytes:
            return self.read(name)
        start = stored.offset_bytes - stored.offset_bytes % mmap.ALLOCATIONGRANULARITY
        with reading_errors(self._path), self._path.open("rb") as file:
            # Private and writable, as torch requires. Pages that are only read are shared with the page cache.
            mapped = mmap.mmap(
                file.fileno(),
                stored.end_bytes - start,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=start,
            )
        memory = torch.frombuffer(
            mapped, dtype=torch.uint8, count=stored.span_bytes, offset=stored.offset_bytes - start
        )
        return _as_stored(memory, stored)

    def read_ahead(self, name: str) -> None:
        """Have the system start to read a tensor into the page cache."""
        if self._reader is not None:
            self._reader.read_ahead(self._places[name].offset_bytes, self._places[name].span_bytes)

    def forget(self, name: str) -> None:
        """Have the system drop a tensor from its page cache."""
        if self._reader is not None:
            self._reader.forget(self._places[name].offset_bytes, self._places[name].span_bytes)

    def close(self) -> None:
        self._legacy = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def _as_stored(memory: Tensor, stored: StoredTensor) -> Tensor:
    """A tensor's bytes as a tensor of its dtype and shape."""
    spec, dtype = stored.spec, _dtype_of(stored)
    if memory.data_ptr() % dtype.itemsize:  # old writers did not align the data
        memory = memory.clone()
    values = memory.view(dtype)
    if stored.pitch is not None:
        return values.as_strided(spec.shape, (1, stored.pitch)).contiguous()
    if stored.column_major:
        return values.view(spec.shape[::-1]).t().contiguous()
    return values.view(spec.shape)


def _dtype_of(stored: StoredTensor) -> torch.dtype:
    """The dtype of a tensor's bytes in the file. Raises CheckpointError for one that torch does not have."""
    if stored.file_dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{stored.spec.name} has the dtype {stored.file_dtype}, in which no model runs")
    return TORCH_DTYPES[stored.file_dtype]
