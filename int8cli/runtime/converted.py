"""A model that `convert` wrote, read for evaluation: its int8 tensors, and the floats they represent.

Owns how the names and scales of each layout become `Int8Data`, and where stored outlier columns are. Does not know
about evaluation methods.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int8cli.checkpoint.source import Source
from int8cli.checkpoint.tensor import QUANTIZABLE_DTYPES, ShardContents, TensorSpec
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.checkpoint.weight_files import read_contents
from int8cli.errors import CheckpointError
from int8cli.llm_int8.baselines import restored_weight
from int8cli.llm_int8.quantize import INT8_MAX
from int8cli.planning.layouts import LAYOUTS
from int8cli.planning.output_files import SIDECAR_DIRECTORY, outlier_cols_name, outlier_weight_name

_WEIGHT = ".weight"
_AGAIN = "Convert the model again, or remove int8/outliers to run without stored columns."


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
class _Scale:
    """The tensor with a weight's scales, and whether these are steps (row_absmax / 127) or row_absmax itself."""

    name: str
    is_step: bool


@dataclass(frozen=True, slots=True)
class Converted:
    """A converted model's files and tensors. `specs` are the tensors of the model itself, without scales and marks.

    `scales` is keyed by the name of the int8 weight. `sidecars` are the files with stored outlier columns, if any.
    """

    shards: tuple[ShardContents, ...]
    sidecars: tuple[ShardContents, ...]
    specs: Mapping[str, TensorSpec]
    scales: Mapping[str, _Scale]

    @property
    def exact_column_counts(self) -> tuple[int, ...]:
        """The number of stored columns of each layer that has any."""
        stored = [tensor.spec for contents in self.sidecars for tensor in contents.tensors]
        return tuple(spec.numel for spec in stored if spec.name.endswith(outlier_cols_name("")))

    @property
    def stored(self) -> dict[str, TensorSpec]:
        """The tensors in the sidecars, by name."""
        return {tensor.spec.name: tensor.spec for contents in self.sidecars for tensor in contents.tensors}

    @property
    def modules(self) -> frozenset[str]:
        """The names of the int8 linear layers in the checkpoint."""
        return frozenset(name.removesuffix(_WEIGHT) for name in self.scales)


def find_converted(source: Source, shards: Sequence[ShardContents]) -> Converted | None:
    """The int8 weights of a checkpoint in one of our layouts; None if there are none.

    Raises CheckpointError if an int8 weight is not a matrix with one scale per row, or if stored columns do not fit
    their layer.
    """
    specs = {stored.spec.name: stored.spec for contents in shards for stored in contents.tensors}
    scales: dict[str, _Scale] = {}
    extras: set[str] = set()  # scales and marks
    for layout in LAYOUTS.values():
        for name, spec in specs.items():
            if name.endswith(_WEIGHT) and spec.dtype == "I8" and layout.scale_name(name) in specs:
                _check_scale(spec, specs[layout.scale_name(name)])
                scales[name] = _Scale(layout.scale_name(name), layout.SCALES == "step")
                extras |= {layout.scale_name(name), *layout.marks(name)}
    if not scales:
        return None
    model_specs = {name: spec for name, spec in specs.items() if name not in extras}
    converted = Converted(tuple(shards), tuple(_sidecars(source)), model_specs, scales)
    _check_columns(converted)
    return converted


def _check_scale(weight: TensorSpec, scale: TensorSpec) -> None:
    if len(weight.shape) != 2 or scale.dtype not in QUANTIZABLE_DTYPES or scale.numel != weight.shape[0]:
        raise CheckpointError(
            f"{weight.name} is I8 {list(weight.shape)} and {scale.name} {scale.dtype} {list(scale.shape)}, "
            "not a matrix and one float per row",
            hint="Convert the model again.",
        )


def _check_columns(converted: Converted) -> None:
    """Raises CheckpointError unless all stored columns belong to int8 layers, as I32 [k] and floats [out, k]."""
    stored = converted.stored
    for name in stored:
        if name.rpartition(".")[0] not in converted.modules:
            raise CheckpointError(f"{name} stores columns of a layer that is not in int8", hint=_AGAIN)
    for module in sorted({name.rpartition(".")[0] for name in stored}):
        out_features = converted.specs[f"{module}{_WEIGHT}"].shape[0]
        columns, weights = stored.get(outlier_cols_name(module)), stored.get(outlier_weight_name(module))
        if columns is None or weights is None or not _fits(columns, weights, out_features):
            raise CheckpointError(
                f"{module}: its stored columns are {_shown(columns)} and {_shown(weights)}; a layer with "
                f"{out_features} outputs needs I32 [k] and floats [{out_features}, k]",
                hint=_AGAIN,
            )


def _fits(columns: TensorSpec, weights: TensorSpec, out_features: int) -> bool:
    dtypes_fit = columns.dtype == "I32" and weights.dtype in QUANTIZABLE_DTYPES
    return dtypes_fit and len(columns.shape) == 1 and weights.shape == (out_features, columns.numel)


def _shown(spec: TensorSpec | None) -> str:
    return "missing" if spec is None else f"{spec.dtype} {list(spec.shape)}"


def _sidecars(source: Source) -> Iterable[ShardContents]:
    for name in source.list_files():
        if name.startswith(f"{SIDECAR_DIRECTORY}/") and name.endswith(".safetensors"):
            with source.open(name) as file:
                yield read_contents(file, "safetensors", name, source.size_bytes(name))


def check_indices(module: str, indices: Sequence[int], in_features: int) -> None:
    """Raise CheckpointError unless a layer's stored columns are ascending indices of its inputs."""
    if list(indices) != sorted(set(indices)) or (indices and not 0 <= indices[0] <= indices[-1] < in_features):
        raise CheckpointError(
            f"{module}: its stored columns {str(indices)[:80]} are not ascending indices below {in_features}",
            hint=_AGAIN,
        )


class ConvertedTensors(CheckpointTensors):
    """Reads a converted model with its int8 weights restored to floats, and also the int8 tensors as they are.

    `dtype` is the dtype of restored weights. Those of `transposed` modules have the shape (in, out), as in Conv1D.
    """

    def __init__(self, source: Source, converted: Converted) -> None:
        super().__init__(source, (*converted.shards, *converted.sidecars))
        self._scales = converted.scales
        self._known = converted.stored
        self._in_features = {name: converted.specs[f"{name}{_WEIGHT}"].shape[1] for name in converted.modules}
        self.dtype = torch.float32
        self.transposed: frozenset[str] = frozenset()

    def read(self, name: str) -> Tensor:
        if name not in self._scales:
            return super().read(name)
        module = name.removesuffix(_WEIGHT)
        stored = self.int8(module)
        weight = restored_weight(stored.data, stored.row_absmax, self.dtype)
        return weight.t().contiguous() if module in self.transposed else weight

    def map(self, name: str) -> Tensor:
        return self.read(name) if name in self._scales else super().map(name)

    def map_stored(self, name: str) -> Tensor:
        """A tensor as the checkpoint has it, int8 too, as a mapping of its file. Not to be written to."""
        return super().map(name)

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
        return Int8Data(super().read(f"{module}{_WEIGHT}"), self.row_absmax(module))

    def row_absmax(self, module: str) -> Tensor:
        """The scales of a linear layer: float32 (out,)."""
        scale = self._scales[f"{module}{_WEIGHT}"]
        values = super().read(scale.name).float().reshape(-1)
        return values * INT8_MAX if scale.is_step else values

    def exact_columns(self, module: str) -> ExactColumns | None:
        """The outlier columns stored for a linear layer; None if it has none. Raises CheckpointError for bad ones."""
        columns = outlier_cols_name(module)
        if columns not in self._known:
            return None
        indices = super().read(columns)
        check_indices(module, indices.tolist(), self._in_features[module])
        return ExactColumns(indices.long(), super().read(outlier_weight_name(module)))
