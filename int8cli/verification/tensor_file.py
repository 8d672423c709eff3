"""Reads rectangles of the tensors of a safetensors file, by the file's own header.

Owns a second reading of the format, for judging what the first one led to: it shares only `pread` with the conversion.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from int8cli.checkpoint.reader import FileReader
from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES
from int8cli.errors import CorruptShardError

_LENGTH_BYTES = 8


class TensorFile:
    """An open safetensors file. Raises CorruptShardError for a header that is none, and where the file ends early."""

    def __init__(self, path: Path) -> None:
        self._reader = FileReader(path)
        try:
            length = int.from_bytes(self._bytes(0, _LENGTH_BYTES), "little")
            header = json.loads(self._bytes(_LENGTH_BYTES, min(length, self._reader.size_bytes)))
            header.pop("__metadata__", None)
            self._places = {
                name: (
                    str(entry["dtype"]),
                    tuple(map(int, entry["shape"])),
                    _LENGTH_BYTES + length + int(entry["data_offsets"][0]),
                )
                for name, entry in header.items()
            }
            self._ends = {
                name: _LENGTH_BYTES + length + int(entry["data_offsets"][1]) for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            self.close()
            raise CorruptShardError(f"{path.name}: its header cannot be read ({error})") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def dtype(self, name: str) -> str:
        """The dtype's name in the format."""
        return self._places[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][1]

    def size_bytes(self, name: str) -> int:
        return self._ends[name] - self._places[name][2]

    def raw(self, name: str, start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of a tensor."""
        return self._bytes(self._places[name][2] + start, stop - start)

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor in row-major order, in its dtype."""
        dtype = TORCH_DTYPES[self.dtype(name)]
        return self._tensor(self.raw(name, start * dtype.itemsize, stop * dtype.itemsize), dtype)

    def rectangle(self, name: str, matrix: int, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """Rows and columns [first, end) of one matrix of a tensor: those in its last two dimensions, counted through.

        Reads no more than that.
        """
        height, width = self.shape(name)[-2:]
        first = matrix * height * width
        if columns == (0, width):
            found = self.elements(name, first + rows[0] * width, first + rows[1] * width)
        else:
            starts = (first + row * width for row in range(*rows))
            found = torch.cat([self.elements(name, start + columns[0], start + columns[1]) for start in starts])
        return found.view(rows[1] - rows[0], columns[1] - columns[0])

    def _bytes(self, offset: int, size: int) -> bytearray:
        found = bytearray(size)
        self._reader.read_into(offset, memoryview(found))
        return found

    @staticmethod
    def _tensor(data: bytearray, dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
