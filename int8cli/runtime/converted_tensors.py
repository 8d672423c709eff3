"""The tensors of a model that `convert` wrote: as they are in int8, and as the floats that they represent.

Owns how the bytes and scales of each layout become `Int8Data`, and where stored outlier columns are. Does not know
about evaluation methods.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int8cli.checkpoint.source import ShardFile, Source
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.errors import CheckpointError
from int8cli.llm_int8.baselines import restored_weight
from int8cli.llm_int8.limits import EXACT_STEPS, FINE_STEPS, Steps
from int8cli.llm_int8.quantize import INT8_MAX
from int8cli.planning.exponents import are_sound, columns_name, rows_name
from int8cli.planning.fused_experts import FusedTensor
from int8cli.planning.output_files import outlier_cols_name, outlier_weight_name
from int8cli.runtime.converted import CONVERT_AGAIN, Converted, check_indices

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Int8Data:
    """int8 data (out, in) and float32 row_absmax (out,) of a weight, as stored in a checkpoint or freshly quantized."""

    data: Tensor
    row_absmax: Tensor


@dataclass(frozen=True, slots=True)
class ExactColumns:
    """The input columns that a layer computes exactly, int64 (k,), sorted; and their weights (out, k)."""

    columns: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True)
class Exponents:
    """The exponents of a tensor's rows and columns, int8, of which `steps` are a factor of 2. None: not scaled."""

    rows: Tensor | None
    columns: Tensor | None
    steps: Steps


def signed(packed: Tensor) -> Tensor:
    """The int8 values of packed data, which has them plus 128: a new tensor of the same shape."""
    return packed.bitwise_xor(-128)


class ConvertedTensors(CheckpointTensors):
    """Reads a converted model with its int8 weights restored to floats, and also the int8 tensors as they are.

    `dtype` is the dtype of restored weights. Those of `transposed` modules have the shape (in, out), as in Conv1D.
    """

    def __init__(self, source: Source, converted: Converted) -> None:
        super().__init__(source, (*converted.shards, *converted.sidecars))
        self._scales, self._packed = converted.scales, converted.packed
        self._known = converted.stored
        self._fused = converted.fused
        self._in_features = {name: converted.specs[f"{name}{_WEIGHT}"].shape[1] for name in converted.modules}
        self.dtype = torch.float32
        self.transposed: frozenset[str] = frozenset()

    def read(self, name: str) -> Tensor:
        if name in self._fused:
            return self._read_fused(self._fused[name])
        if name not in self._scales:
            return super().read(name)
        module = name.removesuffix(_WEIGHT)
        stored = self.int8(module)
        weight = restored_weight(stored.data, stored.row_absmax, self.dtype)
        return weight.t().contiguous() if module in self.transposed else weight

    def _read_fused(self, fused: FusedTensor) -> Tensor:
        """Experts that the files have one by one, as one tensor in `dtype`."""
        result = torch.empty(fused.spec.shape, dtype=self.dtype)
        for matrix, names in zip(result, fused.parts, strict=True):
            along = matrix.t() if fused.transposed else matrix
            rows = along.shape[0] // len(names)
            for place, name in enumerate(names):
                along[place * rows : (place + 1) * rows].copy_(self.read(name))
        return result

    def map(self, name: str) -> Tensor:
        return self.read(name) if name in self._scales or name in self._fused else super().map(name)

    def expect(self, names: Iterable[str]) -> None:
        super().expect(self._in_files(names))

    def prefetch(self, names: Iterable[str]) -> None:
        super().prefetch(self._in_files(names))

    def finished(self, names: Iterable[str]) -> Iterator[ShardFile]:
        return super().finished(self._in_files(names))

    def added_shard_bytes(self, steps: Sequence[Sequence[str]]) -> int:
        return super().added_shard_bytes([self._in_files(step) for step in steps])

    def _in_files(self, names: Iterable[str]) -> list[str]:
        """The tensors of the files for these of the model."""
        return [each for name in names for each in (self._fused[name].names if name in self._fused else (name,))]

    def map_stored(self, name: str) -> Tensor:
        """A tensor as the checkpoint has it, int8 too, as a mapping of its file. Not to be written to."""
        found = super().map(name)
        return signed(found) if name in self._packed else found

    def row_blocks(self, name: str, elements: int) -> Iterator[Tensor]:
        for block in super().row_blocks(name, elements):
            yield signed(block) if name in self._packed else block

    def names_of(self, modules: Iterable[str]) -> list[str]:
        """For each of these linear layers, one of its tensors in each file: its weight, and its outlier_cols if any."""
        found = []
        for module in modules:
            found.append(f"{module}{_WEIGHT}")
            if outlier_cols_name(module) in self._known:
                found.append(outlier_cols_name(module))
        return found

    def int8(self, module: str) -> Int8Data:
        """The int8 data and row_absmax of a linear layer."""
        name = f"{module}{_WEIGHT}"
        data = super().read(name)
        return Int8Data(signed(data) if name in self._packed else data, self.row_absmax(module))

    def row_absmax(self, module: str) -> Tensor:
        """The scales of a linear layer: float32 (out,)."""
        scale = self._scales[f"{module}{_WEIGHT}"]
        values = super().read(scale.name).float().reshape(-1)
        return values * INT8_MAX if scale.is_step else values

    def exponents(self, name: str) -> "Exponents":
        """The exponents of a tensor's rows and columns. Raises CheckpointError."""
        for steps in (FINE_STEPS, EXACT_STEPS):
            names = rows_name(name, steps), columns_name(name, steps)
            if any(each in self._known for each in names):
                break
        rows, columns = (self._exponents(each, steps) for each in names)
        return Exponents(rows, columns, steps)

    def _exponents(self, name: str, steps: Steps) -> Tensor | None:
        if name not in self._known:
            return None
        found = super().read(name)
        if not are_sound(bytes(found.view(torch.uint8).tolist()), steps):
            raise CheckpointError(f"{name} is not made of exponents", hint=CONVERT_AGAIN)
        return found

    def exact_columns(self, module: str) -> ExactColumns | None:
        """The outlier columns stored for a linear layer; None if it has none. Raises CheckpointError for bad ones."""
        columns = outlier_cols_name(module)
        if columns not in self._known:
            return None
        indices = super().read(columns)
        check_indices(module, indices.tolist(), self._in_features[module])
        return ExactColumns(indices.long(), super().read(outlier_weight_name(module)))
