"""Blocks of a shard multiplied by the scales of a smoothing.

Owns the exponents of each tensor as torch has them, and the check that a tensor which stays a float loses no more than
its last digit, and nothing at all by powers of two.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from int8cli.conversion.buffers import Workbench
from int8cli.errors import InexactSmoothingError
from int8cli.llm_int8.limits import EXACT_STEPS, Steps
from int8cli.llm_int8.scales import scaled, scales
from int8cli.planning.blocks import Matrix, Rectangle
from int8cli.planning.exponents import TensorExponents


class BlockScaling:
    """Scales the blocks of the tensors that have exponents; the others stay as they are."""

    def __init__(self, exponents: Mapping[str, TensorExponents], device: str) -> None:
        self._exponents = {name: _Exponents(found, torch.device(device)) for name, found in exponents.items()}

    def scaled(self, bench: Workbench, matrix: Matrix, part: Rectangle, loaded: Tensor) -> Tensor:
        """A rectangle (rows, columns) of a weight as a new one, of the same dtype.

        The block that was loaded stays as it is: its bytes are those of the source.
        """
        found = self._exponents.get(matrix.stored.spec.name)
        if found is None:
            return loaded
        rows, columns = found.rows, found.columns
        return scaled(
            loaded,
            found.steps,
            rows=None if rows is None else rows[part.row : part.row + part.rows],
            columns=None if columns is None else columns[part.column : part.column + part.columns],
            out=bench.copy_like(loaded),
        )

    def scaled_vector(self, name: str, part: Rectangle, loaded: Tensor) -> Tensor:
        """A piece (1, elements) of a vector, on the CPU.

        Raises InexactSmoothingError if powers of two lose digits, or finer scales more than rounding to the dtype does.
        """
        found = self._exponents[name]
        assert found.rows is not None
        rows = found.rows[part.column : part.column + part.columns].to(loaded.device)
        result = scaled(loaded.reshape(-1, 1), found.steps, rows=rows).reshape(loaded.shape)
        lost = _loses(loaded, result, rows, found.steps)
        if bool(lost.any()):
            raise InexactSmoothingError(
                f"{name} has the value {float(loaded[lost].flatten()[0]):.3g}, too small or too large to be divided "
                f"by {'a power of two' if found.steps == EXACT_STEPS else 'the scale of its column'}",
                hint="Convert without smoothing.",
            )
        return result


class _Exponents:
    """The exponents of one tensor on a device, int8."""

    def __init__(self, found: TensorExponents, device: torch.device) -> None:
        self.steps: Steps = found.steps
        self.rows, self.columns = _tensor(found.rows, device), _tensor(found.columns, device)


def _tensor(exponents: bytes, device: torch.device) -> Tensor | None:
    return torch.frombuffer(bytearray(exponents), dtype=torch.int8).to(device) if exponents else None


def _loses(before: Tensor, after: Tensor, rows: Tensor, steps: Steps) -> Tensor:
    """Where a value has lost digits by more than one rounding to its dtype, or at all by powers of two."""
    back = after.double() * scales(-rows, steps).double()
    allowed = 0.0 if steps == EXACT_STEPS else torch.finfo(before.dtype).eps / 2.0
    wrong = (back - before.double()).abs() > allowed * before.double().abs()
    return torch.isfinite(before) & (wrong | ~torch.isfinite(after))
