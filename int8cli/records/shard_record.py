"""The record of one finished shard: `int8/records/<shard>.json`.

Owns the schema of the file. Reads and writes nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from int8cli.checkpoint.output_names import OWN_DIRECTORY
from int8cli.checkpoint.tensor import TensorSpec
from int8cli.records.conversion import ShardSource
from int8cli.records.documents import check_shard_name, check_tensor, without_schema
from int8cli.results.conversion import LayerReport
from int8cli.typed_json import InvalidJsonError, inside, read_as, shown

_SIDECARS = f"{OWN_DIRECTORY}/outliers"
RECORD_SCHEMA = "int8cli.record/2"  # 2: the figures of a layer are null where they were not measured
_RECORD_SCHEMAS = ("int8cli.record/1", RECORD_SCHEMA)


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor as written: `xxh3_128` is the digest of its bytes, in hex."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str

    @property
    def size_bytes(self) -> int:
        return TensorSpec(self.name, self.dtype, self.shape).nbytes


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as written, by its name in the output directory. `header_xxh3_128` covers the safetensors header.

    The tensors follow the header in this order, without gaps.
    """

    file: str
    size_bytes: int
    header_xxh3_128: str
    tensors: tuple[TensorRecord, ...]

    @property
    def header_bytes(self) -> int:
        """The size of the header: that of the file minus that of its tensors."""
        return self.size_bytes - sum(tensor.size_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class NonFiniteTensor:
    """A weight that holds NaN or an infinity; `place` says where the first one is."""

    tensor: str
    place: str


@dataclass(frozen=True, slots=True)
class _RecordFields:
    """The fields of a record on disk, without its schema. The layers are parsed separately."""

    source: ShardSource
    source_sha256: str | None
    source_tensors: tuple[TensorSpec, ...]
    files: tuple[FileRecord, ...]
    layers: tuple[Any, ...]
    kept: tuple[NonFiniteTensor, ...]


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished shard: its source, every file made from it, and what int8 did to its layers.

    `files` lists the shard itself first, then its sidecar if there is one. `source_tensors` are all tensors of the
    source shard. `non_finite` lists the weights that were copied instead of quantized; the file calls them `kept`.
    """

    source: ShardSource
    source_sha256: str | None
    source_tensors: tuple[TensorSpec, ...]
    files: tuple[FileRecord, ...]
    layers: tuple[LayerReport, ...]
    non_finite: tuple[NonFiniteTensor, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": RECORD_SCHEMA,
            "source": asdict(self.source),
            "source_sha256": self.source_sha256,
            "source_tensors": [asdict(spec) for spec in self.source_tensors],
            "files": [asdict(file) for file in self.files],
            "layers": [layer.to_json() for layer in self.layers],
            "kept": [asdict(weight) for weight in self.non_finite],
        }

    @classmethod
    def from_json(cls, document: Any) -> "ShardRecord":
        """Raises InvalidJsonError for values or file names that no record has."""
        found = read_as(_RecordFields, without_schema(document, *_RECORD_SCHEMAS))
        if not found.files:
            raise InvalidJsonError("does not name a file", "files")
        check_shard_name(found.source.output, "source.output")
        for index, tensor in enumerate(found.source_tensors):
            check_tensor(tensor, f"source_tensors[{index}]")
        _check_files([file.file for file in found.files], found.source.output)
        for index, file in enumerate(found.files):
            for place, record in enumerate(file.tensors):
                check_tensor(record, f"files[{index}].tensors[{place}]")
        layers = tuple(_layer(layer, f"layers[{index}]") for index, layer in enumerate(found.layers))
        return cls(found.source, found.source_sha256, found.source_tensors, found.files, layers, found.kept)


def _check_files(names: Sequence[str], output: str) -> None:
    """Raise InvalidJsonError unless these are the shard `output` and, at most, its sidecar: other files are others'."""
    for index, (name, due) in enumerate(zip_longest(names, (output, f"{_SIDECARS}/{output}"))):
        if name is not None and name != due:
            problem = f"is {shown(name)}, which is not a file of the shard {output}"
            raise InvalidJsonError(problem, f"files[{index}].file")


def _layer(value: Any, place: str) -> LayerReport:
    with inside(place):
        return LayerReport.from_json(value)
