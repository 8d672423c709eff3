"""A model that `convert` wrote, by its headers: which tensors are int8 weights, scales, stored columns and exponents.

Owns how the names of each layout are understood, and the checks that what belongs together fits. Reads no tensors.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from int8cli.checkpoint.config_file import CONFIG_FILE, read_config
from int8cli.checkpoint.source import Source
from int8cli.checkpoint.tensor import QUANTIZABLE_DTYPES, ShardContents, StoredTensor, TensorSpec
from int8cli.checkpoint.weight_files import read_contents
from int8cli.errors import CheckpointError
from int8cli.planning.decisions import Plan
from int8cli.planning.exponents import are_of_rows, is_exponents, tensor_of
from int8cli.planning.fused_experts import FusedTensor, fused_tensors
from int8cli.planning.layouts import LAYOUTS_BY_KEY, weights_only
from int8cli.planning.output_files import SIDECAR_DIRECTORY, outlier_cols_name, outlier_weight_name

_WEIGHT, _PACKED = ".weight", ".weight_packed"
CONVERT_AGAIN = "Convert the model again, or remove int8/outliers to run without stored columns."


@dataclass(frozen=True, slots=True)
class Scale:
    """The tensor with a weight's scales, and whether these are steps (row_absmax / 127) or row_absmax itself."""

    name: str
    is_step: bool


@dataclass(frozen=True, slots=True)
class Converted:
    """A converted model's files and tensors. `specs` are the tensors of the model itself, without scales and marks.

    `scales` is keyed by the name of the int8 weight. `sidecars` are the files with stored outlier columns, if any.
    Weights in `packed` are unsigned, data + 128: they stand in `shards` as the int8 matrices that they hold, under the
    name of the weight. `headers` are the shards as their headers have them. `fused` are tensors of experts that the
    model's class wants and that the files have one by one, by name.
    """

    shards: tuple[ShardContents, ...]
    sidecars: tuple[ShardContents, ...]
    specs: Mapping[str, TensorSpec]
    scales: Mapping[str, Scale]
    headers: tuple[ShardContents, ...]
    packed: frozenset[str] = frozenset()
    fused: Mapping[str, FusedTensor] = field(default_factory=dict)

    @property
    def model_specs(self) -> dict[str, TensorSpec]:
        """The tensors as the model's class wants them: `specs`, with fused tensors of experts."""
        parts = {name for fused in self.fused.values() for name in fused.names}
        specs = {name: spec for name, spec in self.specs.items() if name not in parts}
        return specs | {name: fused.spec for name, fused in self.fused.items()}

    def as_fused(self, config: Mapping[str, Any]) -> "Converted":
        """The same, with the fused tensors of experts that a model with this config wants."""
        return replace(self, fused={fused.spec.name: fused for fused in fused_tensors(self.specs.values(), config)})

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
    scales: dict[str, Scale] = {}
    extras: set[str] = set()  # scales and marks
    for layout in LAYOUTS_BY_KEY.values():
        for name, spec in specs.items():
            if name.endswith(_WEIGHT) and spec.dtype == "I8" and layout.scale_name(name) in specs:
                _check_scale(spec, specs[layout.scale_name(name)])
                scales[name] = Scale(layout.scale_name(name), layout.SCALES == "step")
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
    modules, sidecars = converted.modules, converted.stored
    stored = {name: spec for name, spec in sidecars.items() if not is_exponents(name)}
    for name in sidecars.keys() - stored.keys():
        _check_exponents(converted, sidecars[name])
    for name in stored:
        if name.rpartition(".")[0] not in modules:
            raise CheckpointError(f"{name} stores columns of a layer that is not in int8", hint=CONVERT_AGAIN)
    for module in sorted({name.rpartition(".")[0] for name in stored}):
        out_features = converted.specs[f"{module}{_WEIGHT}"].shape[0]
        columns, weights = stored.get(outlier_cols_name(module)), stored.get(outlier_weight_name(module))
        if columns is None or weights is None or not _fits(columns, weights, out_features):
            raise CheckpointError(
                f"{module}: its stored columns are {_shown(columns)} and {_shown(weights)}; a layer with "
                f"{out_features} outputs needs I32 [k] and floats [{out_features}, k]",
                hint=CONVERT_AGAIN,
            )


def _check_exponents(converted: Converted, found: TensorSpec) -> None:
    """Raise CheckpointError unless exponents are I8, one for each row or column of a tensor of the model."""
    tensor = tensor_of(found.name)
    spec = converted.specs.get(tensor)
    size = None if spec is None or not spec.shape else spec.shape[0 if are_of_rows(found.name) else -1]
    if found.dtype != "I8" or found.shape != (size,):
        raise CheckpointError(
            f"{found.name} is {_shown(found)}, which are no exponents for {tensor} {_shown(spec)}", hint=CONVERT_AGAIN
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
            hint=CONVERT_AGAIN,
        )
