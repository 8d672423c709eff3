"""A converted directory as a state dict. Each tensor is read when a loader asks for it.

Owns which linear layers are int8, and how the scales of each layout become row_absmax. Does not know about models.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.tensor import QUANTIZABLE_DTYPES, TensorSpec
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.checkpoint.weight_files import find_weights, read_headers
from int8cli.errors import ModelNotFoundError, UnsupportedModelError
from int8cli.llm_int8.quantize import INT8_MAX
from int8cli.runtime.converted import Converted, check_indices, find_converted, signed

COLUMNS, COLUMN_WEIGHTS = "outlier_cols", "outlier_weight"


class LoadedTensor:
    """A tensor that is read when a loader slices it, like those of safetensors."""

    def __init__(self, read: Callable[[], Tensor], dtype: str) -> None:
        self._read, self._dtype = read, dtype

    def __getitem__(self, _: object) -> Tensor:
        return self._read()

    def get_dtype(self) -> str:
        """The dtype by its safetensors name."""
        return self._dtype


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """A linear layer in int8, by its name in the checkpoint. `columns_dtype` is a safetensors name."""

    name: str
    in_features: int
    out_features: int
    columns: int
    columns_dtype: str

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"


class StoredModel:
    """The tensors of a converted directory. Close it when they have been read.

    Of those in `left_on_disk` the state dict gives a stand-in of the same shape that takes no memory.
    """

    def __init__(self, directory: Path) -> None:
        """Raises ModelNotFoundError, UnsupportedModelError if nothing is int8, CheckpointError for bad columns."""
        if not directory.is_dir():
            raise ModelNotFoundError(f"{directory} is not a directory", hint="Give a directory that convert wrote.")
        source = DirectorySource(directory)
        shards = read_headers(source, find_weights(source))
        converted = find_converted(source, shards)
        if converted is None:
            raise UnsupportedModelError(
                f"{directory} has no int8 weights in a layout of int8cli",
                hint="Convert the model first, and load the output: int8cli convert MODEL.",
            )
        self._converted = converted
        self.left_on_disk: set[str] = set()
        self._tensors = CheckpointTensors(source, (*converted.shards, *converted.sidecars))
        try:
            self.linears = tuple(_linears(converted, self._tensors))
        except BaseException:
            self._tensors.close()
            raise

    @property
    def float_specs(self) -> Mapping[str, TensorSpec]:
        """The weights that are not int8. Their dtype is the model's."""
        return {name: spec for name, spec in self._converted.specs.items() if spec.dtype in QUANTIZABLE_DTYPES}

    def state_dict(self, renamed: Mapping[str, str] = MappingProxyType({})) -> dict[str, LoadedTensor]:
        """Every tensor by its name in the checkpoint, and those of int8 layers by their names in Int8Linear.

        `renamed` gives other names to some of the int8 layers.
        """
        found = {name: self._tensor(name, spec.dtype) for name, spec in self._converted.specs.items()}
        for linear in self.linears:
            name = renamed.get(linear.name, linear.name)
            found[f"{name}.weight"] = found.pop(linear.weight_name)
            found[f"{name}.row_absmax"] = LoadedTensor(self._row_absmax(linear), "F32")
            found[f"{name}.{COLUMNS}"] = self._columns(linear, COLUMNS, "I32")
            found[f"{name}.{COLUMN_WEIGHTS}"] = self._columns(linear, COLUMN_WEIGHTS, linear.columns_dtype)
        return found

    def forget(self, name: str) -> None:
        """Have the system drop a tensor from its page cache."""
        self._tensors.forget(name)

    def close(self) -> None:
        self._tensors.close()

    def _tensor(self, name: str, dtype: str) -> LoadedTensor:
        return LoadedTensor(lambda: self._read(name), dtype)

    def _read(self, name: str) -> Tensor:
        if name in self.left_on_disk:
            return torch.zeros((), dtype=torch.int8).expand(self._converted.specs[name].shape)
        return self._signed(name, self._tensors.read(name))

    def _signed(self, name: str, found: Tensor) -> Tensor:
        return signed(found) if name in self._converted.packed else found

    def map(self, name: str) -> Tensor:
        """A tensor as a mapping of its shard, which is read ahead. Not to be written to."""
        self._tensors.read_ahead(name)
        return self._signed(name, self._tensors.map(name))

    def _columns(self, linear: StoredLinear, kind: str, dtype: str) -> LoadedTensor:
        if linear.columns:
            return self._tensor(f"{linear.name}.{kind}", dtype)
        none = torch.empty(0, dtype=torch.int32) if kind == COLUMNS else torch.empty(linear.out_features, 0)
        return LoadedTensor(lambda: none, dtype)

    def _row_absmax(self, linear: StoredLinear) -> Callable[[], Tensor]:
        scale = self._converted.scales[linear.weight_name]

        def read() -> Tensor:
            values = self._tensors.read(scale.name).float().reshape(-1)
            return values * INT8_MAX if scale.is_step else values

        return read


def _linears(converted: Converted, tensors: CheckpointTensors) -> Iterator[StoredLinear]:
    stored = converted.stored
    for name in sorted(converted.modules):
        out_features, in_features = converted.specs[f"{name}.weight"].shape
        columns = stored.get(f"{name}.{COLUMNS}")
        if columns is None or not columns.numel:
            yield StoredLinear(name, in_features, out_features, 0, "F32")
            continue
        check_indices(name, tensors.read(columns.name).tolist(), in_features)
        yield StoredLinear(name, in_features, out_features, columns.numel, stored[f"{name}.{COLUMN_WEIGHTS}"].dtype)
