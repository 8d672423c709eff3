"""A model that `convert` wrote, read for evaluation: its int8 tensors, and the floats they represent.

Owns how the names and scales of each layout become `Int8Data`, and where stored outlier columns are. Does not know
about evaluation methods.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8cli.checkpoint.config_file import CONFIG_FILE, read_config
from int8cli.checkpoint.source import Source
from int8cli.checkpoint.tensor import QUANTIZABLE_DTYPES, ShardContents, StoredTensor, TensorSpec
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.checkpoint.weight_files import read_contents
from int8cli.errors import CheckpointError
from int8cli.llm_int8.baselines import restored_weight
from int8cli.llm_int8.quantize import INT8_MAX
from int8cli.planning.decisions import Plan
from int8cli.planning.exponents import are_sound, columns_name, is_exponents, rows_name, tensor_of
from int8cli.planning.layouts import LAYOUTS_BY_KEY, weights_only
from int8cli.planning.output_files import SIDECAR_DIRECTORY, outlier_cols_name, outlier_weight_name

_WEIGHT, _PACKED = ".weight", ".weight_packed"
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
    Weights in `packed` are unsigned, data + 128: they stand in `shards` as the int8 matrices that they hold, under the
    name of the weight. `headers` are the shards as their headers have them.
    """

    shards: tuple[ShardContents, ...]
    sidecars: tuple[ShardContents, ...]
    specs: Mapping[str, TensorSpec]
    scales: Mapping[str, _Scale]
    headers: tuple[ShardContents, ...]
    packed: frozenset[str] = frozenset()

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
    def smoothed(self) -> frozenset[str]:
        """The tensors that a smoothing changed."""
        return frozenset(tensor_of(name) for name in self.stored if is_exponents(name))

    @property
    def modules(self) -> frozenset[str]:
        """The names of the int8 linear layers in the checkpoint."""
        return frozenset(name.removesuffix(_WEIGHT) for name in self.scales)


def find_converted(source: Source, shards: Sequence[ShardContents]) -> Converted | None:
    """The int8 weights of a checkpoint in one of our layouts; None if there are none.

    Raises CheckpointError if an int8 weight is not a matrix with one scale per row, or if stored columns do not fit
    their layer.
    """
    headers, packed = tuple(shards), frozenset[str]()
    if any(tensor.spec.name.endswith(_PACKED) for contents in shards for tensor in contents.tensors):
        shards, packed = _unpacked(source, shards)
    specs = {stored.spec.name: stored.spec for contents in shards for stored in contents.tensors}
    scales: dict[str, _Scale] = {}
    extras: set[str] = set()  # scales and marks
    for layout in LAYOUTS_BY_KEY.values():
        for name, spec in specs.items():
            if name.endswith(_WEIGHT) and spec.dtype == "I8" and layout.scale_name(name) in specs:
                _check_scale(spec, specs[layout.scale_name(name)])
                scales[name] = _Scale(layout.scale_name(name), layout.SCALES == "step")
                extras |= {layout.scale_name(name), *layout.marks(name, spec.shape)}
    if not scales:
        return None
    model_specs = {name: spec for name, spec in specs.items() if name not in extras}
    converted = Converted(tuple(shards), tuple(_sidecars(source)), model_specs, scales, headers, packed)
    _check_columns(converted)
    return converted


def _unpacked(source: Source, shards: Sequence[ShardContents]) -> tuple[tuple[ShardContents, ...], frozenset[str]]:
    """The shards with each packed matrix as the int8 matrix that it holds, and the names of these.

    They are left as they are unless config.json says that eight bits are packed, by row and around zero.
    """
    if not _packs_int8(source):
        return tuple(shards), frozenset()
    names: set[str] = set()

    def unpacked(stored: StoredTensor) -> StoredTensor:
        spec = stored.spec
        if not spec.name.endswith(_PACKED) or spec.dtype != "I32" or len(spec.shape) != 2:
            return stored
        weight = spec.name.removesuffix(_PACKED) + _WEIGHT
        names.add(weight)
        shape = (spec.shape[0], spec.shape[1] * weights_only.VALUES_A_WORD)
        return replace(stored, spec=TensorSpec(weight, "I8", shape))

    found = tuple(replace(each, tensors=tuple(map(unpacked, each.tensors))) for each in shards)
    return found, frozenset(names)


def _packs_int8(source: Source) -> bool:
    if CONFIG_FILE not in source.list_files():
        return False
    declared = read_config(source).get("quantization_config")
    wanted = weights_only.quantization_config(Plan(()), 0.0)
    if not isinstance(declared, Mapping):
        return False
    return all(declared.get(key) == wanted[key] for key in ("quant_method", "format", "config_groups"))


def _check_scale(weight: TensorSpec, scale: TensorSpec) -> None:
    if len(weight.shape) != 2 or scale.dtype not in QUANTIZABLE_DTYPES or scale.numel != weight.shape[0]:
        raise CheckpointError(
            f"{weight.name} is I8 {list(weight.shape)} and {scale.name} {scale.dtype} {list(scale.shape)}, "
            "not a matrix and one float per row",
            hint="Convert the model again.",
        )


def _check_columns(converted: Converted) -> None:
    """Raises CheckpointError unless all stored columns belong to int8 layers, as I32 [k] and floats [out, k]."""
    stored = {name: spec for name, spec in converted.stored.items() if not is_exponents(name)}
    for name in converted.stored.keys() - stored.keys():
        _check_exponents(converted, converted.stored[name])
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


def _check_exponents(converted: Converted, found: TensorSpec) -> None:
    """Raise CheckpointError unless exponents are I8, one for each row or column of a tensor of the model."""
    tensor = tensor_of(found.name)
    spec = converted.specs.get(tensor)
    size = None if spec is None or not spec.shape else spec.shape[-1 if found.name == columns_name(tensor) else 0]
    if found.dtype != "I8" or found.shape != (size,):
        raise CheckpointError(
            f"{found.name} is {_shown(found)}, which are no exponents for {tensor} {_shown(spec)}", hint=_AGAIN
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

    def exponents(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """The exponents of a tensor's rows and columns, int8; None where it is not scaled. Raises CheckpointError."""
        return self._exponents(rows_name(name)), self._exponents(columns_name(name))

    def _exponents(self, name: str) -> Tensor | None:
        if name not in self._known:
            return None
        found = super().read(name)
        if not are_sound(bytes(found.view(torch.uint8).tolist())):
            raise CheckpointError(f"{name} is not made of exponents", hint=_AGAIN)
        return found

    def exact_columns(self, module: str) -> ExactColumns | None:
        """The outlier columns stored for a linear layer; None if it has none. Raises CheckpointError for bad ones."""
        columns = outlier_cols_name(module)
        if columns not in self._known:
            return None
        indices = super().read(columns)
        check_indices(module, indices.tolist(), self._in_features[module])
        return ExactColumns(indices.long(), super().read(outlier_weight_name(module)))
