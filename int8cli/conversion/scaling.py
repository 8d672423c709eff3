"""Blocks of a shard multiplied by the powers of two of a smoothing.

Owns the factors of each tensor in its dtype, and the check that a tensor which stays a float is changed exactly.
"""

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from int8cli.conversion.buffers import Workbench
from int8cli.errors import InexactSmoothingError
from int8cli.llm_int8.smoothing import powers_of_two
from int8cli.planning.blocks import Matrix, Rectangle
from int8cli.planning.exponents import TensorExponents


class BlockScaling:
    """Scales the blocks of the tensors that have exponents; the others stay as they are."""

    def __init__(self, exponents: Mapping[str, TensorExponents], device: str) -> None:
        self._exponents, self._device = exponents, torch.device(device)
        self._factors: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self._lock = threading.Lock()

    def scaled(self, bench: Workbench, matrix: Matrix, part: Rectangle, loaded: Tensor) -> Tensor:
        """A rectangle (rows, columns) of a weight as a new one, columns multiplied first and then rows, as when proved.

        The block that was loaded stays as it is: its bytes are those of the source.
        """
        name = matrix.stored.spec.name
        if name not in self._exponents:
            return loaded
        rows, columns = self._factors_of(name, loaded.dtype)
        scaled = bench.scaled_copy(loaded)
        if columns is not None:
            scaled *= columns[part.column : part.column + part.columns]
        if rows is not None:
            scaled *= rows[part.row : part.row + part.rows, None]
        return scaled

    def scaled_vector(self, name: str, part: Rectangle, loaded: Tensor) -> Tensor:
        """A piece (1, elements) of a vector, on the CPU. Raises InexactSmoothingError if digits would be lost."""
        rows, _ = self._factors_of(name, loaded.dtype)
        assert rows is not None
        factors = rows[part.column : part.column + part.columns].to(loaded.device)
        scaled = loaded * factors
        same = scaled / factors == loaded
        if not bool((same | loaded.isnan()).all()):
            raise InexactSmoothingError(
                f"{name} has the value {float(loaded[~same].flatten()[0]):.3g}, too small or too large to be divided "
                "by a power of two",
                hint="Convert without smoothing.",
            )
        return scaled

    def _factors_of(self, name: str, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        with self._lock:
            if name not in self._factors:
                found = self._exponents[name]
                self._factors[name] = self._factor(found.rows, dtype), self._factor(found.columns, dtype)
            return self._factors[name]

    def _factor(self, exponents: bytes, dtype: torch.dtype) -> Tensor | None:
        if not exponents:
            return None
        values = torch.frombuffer(bytearray(exponents), dtype=torch.int8)
        return powers_of_two(values, dtype).to(self._device)
