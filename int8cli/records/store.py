"""What a conversion set out to do and what of it is finished: the files under `int8/` that resume and verify trust.

Owns their schema and the order in which they come to be. A shard's record is written
after the shard stands under its final name, so that a record always speaks of a whole file.
"""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from int8cli.checkpoint.output_names import OWN_DIRECTORY, remove_files
from int8cli.checkpoint.own_files import refuse_link, remove_tree
from int8cli.checkpoint.source import SourceIdentity
from int8cli.checkpoint.tensor import TensorSpec
from int8cli.checkpoint.writer import write_file
from int8cli.errors import OutputError, SettingsMismatchError
from int8cli.records.documents import (
    check_file_name,
    check_shard_name,
    check_tensor,
    read_document,
    without_schema,
)
from int8cli.results.conversion import LayerReport
from int8cli.typed_json import InvalidJsonError, read_as

CONVERSION_SCHEMA = "int8cli.conversion/1"
RECORD_SCHEMA = "int8cli.record/2"  # 2: the figures of a layer are null where they were not measured
_RECORD_SCHEMAS = ("int8cli.record/1", RECORD_SCHEMA)
VIA_FLOAT16 = "float16"  # a value of Settings.float32
# The values of Settings.outliers: what the stored columns were chosen by.
NO_OUTLIERS = "none"
FROM_ACTIVATIONS = "activations"
FROM_STATISTICS = "statistics"
FROM_WEIGHTS = "weights"


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the bytes of an output. Two runs with equal settings on one source write the same files.

    `outliers` says what the stored columns are told by ("none" where none are stored), `outlier_columns` how many a
    linear has at most, `calibration` which text and how much of it, or which statistics. `figures`: the error of every
    layer is measured.
    """

    layout: str
    threshold: float
    skip: tuple[str, ...]
    only: tuple[str, ...]
    float32: str
    outliers: str = NO_OUTLIERS
    outlier_columns: int = 0
    calibration: str = ""
    figures: bool = True


@dataclass(frozen=True, slots=True)
class ShardSource:
    """One shard to convert: its file in the source, a fingerprint of its state there, and its file in the output."""

    file: str
    size_bytes: int
    fingerprint: str
    output: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is converted, how, and every file that it will write into the output directory (relative names).

    `plan` is a digest of all planned headers: it notices a config.json, or an int8cli, that decides otherwise.
    """

    source: SourceIdentity
    settings: Settings
    plan: str
    shards: tuple[ShardSource, ...]
    files: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"schema": CONVERSION_SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, document: Any) -> "Conversion":
        """Raises InvalidJsonError for values, or names of files, that no conversion has."""
        found = read_as(cls, without_schema(document, CONVERSION_SCHEMA))
        for index, shard in enumerate(found.shards):
            check_shard_name(shard.output, f"shards[{index}].output")
        for index, name in enumerate(found.files):
            check_file_name(name, f"files[{index}]")
        if len({shard.output for shard in found.shards}) != len(found.shards):
            raise InvalidJsonError("has one output for two of them", "shards")
        return found


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor as written: `xxh3_128` is the digest of its bytes, in hex."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as written, by its name in the output directory. `header_xxh3_128` covers the safetensors header."""

    file: str
    size_bytes: int
    header_xxh3_128: str
    tensors: tuple[TensorRecord, ...]


@dataclass(frozen=True, slots=True)
class _KeptTensor:
    tensor: str
    place: str


@dataclass(frozen=True, slots=True)
class _RecordFields:
    """A shard's record as it is written, but for its schema and its layers, which read themselves."""

    source: ShardSource
    source_sha256: str | None
    source_tensors: tuple[TensorSpec, ...]
    files: tuple[FileRecord, ...]
    layers: tuple[Any, ...]
    kept: tuple[_KeptTensor, ...]


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished shard: where it came from, every file it became, and what int8 did to its layers.

    `files` holds the shard itself first; what else is made from it (a sidecar) follows. `kept` names tensors that were
    left in their source dtype because they hold non-finite values, with the place of the first. `source_tensors` is all
    that the source shard held.
    """

    source: ShardSource
    source_sha256: str | None
    source_tensors: tuple[TensorSpec, ...]
    files: tuple[FileRecord, ...]
    layers: tuple[LayerReport, ...]
    kept: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": RECORD_SCHEMA,
            "source": asdict(self.source),
            "source_sha256": self.source_sha256,
            "source_tensors": [asdict(spec) for spec in self.source_tensors],
            "files": [asdict(file) for file in self.files],
            "layers": [layer.to_json() for layer in self.layers],
            "kept": [{"tensor": tensor, "place": place} for tensor, place in self.kept],
        }

    @classmethod
    def from_json(cls, document: Any) -> "ShardRecord":
        """Raises InvalidJsonError for values, or names of files, that no record has."""
        found = read_as(_RecordFields, without_schema(document, *_RECORD_SCHEMAS))
        if not found.files:
            raise InvalidJsonError("does not name a file", "files")
        check_shard_name(found.source.output, "source.output")
        for index, tensor in enumerate(found.source_tensors):
            check_tensor(tensor, f"source_tensors[{index}]")
        for index, file in enumerate(found.files):
            check_file_name(file.file, f"files[{index}].file")
            for place, record in enumerate(file.tensors):
                check_tensor(record, f"files[{index}].tensors[{place}]")
        layers = tuple(_layer(layer, f"layers[{index}]") for index, layer in enumerate(found.layers))
        kept = tuple((each.tensor, each.place) for each in found.kept)
        return cls(found.source, found.source_sha256, found.source_tensors, found.files, layers, kept)


def _layer(value: Any, place: str) -> LayerReport:
    try:
        return LayerReport.from_json(value)
    except InvalidJsonError as error:
        raise error.inside(place) from None


class RecordStore:
    """The records of one output directory. The caller holds the directory's lock."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self.own = output / OWN_DIRECTORY
        self._conversion_path = self.own / "conversion.json"
        self._records = self.own / "records"
        self._sidecars = self.own / "outliers"

    @property
    def partial_directory(self) -> Path:
        """Where files are made before they get their final name; whatever is there after a kill is worthless."""
        return self.own / "partial"

    @property
    def incoming_directory(self) -> Path:
        """Where shards from the Hub land; a part that is there after a kill is gone on with."""
        return self.own / "incoming"

    @property
    def calibration_directory(self) -> Path:
        """Where what was learnt of the activations or weights is kept until the conversion is finished."""
        return self.own / "calibration"

    def refuse_links(self) -> None:
        """Raise OutputError if one of our own directories is a link: what it leads to is not ours to write in."""
        state = (self.incoming_directory, self.calibration_directory, self.partial_directory)
        for directory in (self.own, self._records, self._sidecars, *state):
            refuse_link(directory)

    def remove_partial_files(self) -> None:
        """Remove what was being made; nobody makes any more."""
        remove_tree(self.partial_directory, self._output)

    def remove_state(self) -> None:
        """Remove what a killed run would have been resumed from."""
        for directory in (self.incoming_directory, self.calibration_directory):
            remove_tree(directory, self._output)

    def conversion(self) -> Conversion | None:
        """The conversion that this directory belongs to, if any."""
        hint = "Without it int8cli cannot tell which files it wrote. Choose another directory, or delete this one."
        return read_document(self._conversion_path, Conversion.from_json, hint)

    def check(self, conversion: Conversion, *, all_files: bool = True) -> None:
        """Whether the directory is free for a conversion, or holds the same one. Writes nothing.

        With `all_files` False, some of its files are not known yet: they are not compared. Raises SettingsMismatchError
        if the directory belongs to another conversion, OutputError if files stand there that are not ours.
        """
        known = self.conversion()
        if known is None:
            self._refuse_foreign_files(conversion)
        elif known != (conversion if all_files else replace(conversion, files=known.files)):
            _refuse_mismatch(self._output, known, conversion)

    def claim(self, conversion: Conversion) -> None:
        """Put down that the directory, which `check` found free, belongs to this conversion."""
        if self.conversion() is None:
            write_file(self._conversion_path, _to_bytes(conversion.to_json()), below=self._output)

    def record(self, shard: ShardSource) -> ShardRecord | None:
        """What was put down when a shard was finished; None if it never was. Raises OutputError."""
        path = self._record_path(shard)
        return read_document(path, ShardRecord.from_json, "Delete it and run again: its shard is then converted again.")

    def finished(self, shard: ShardSource) -> ShardRecord | None:
        """The record of a shard whose files are all in place at their size; None if it must be (re)made."""
        record = self.record(shard)
        if record is None:
            return None
        whole = all(_size_of(self._output / file.file) == file.size_bytes for file in record.files)
        return record if record.source == shard and whole else None

    def add(self, record: ShardRecord) -> None:
        """Put down that a shard is finished. Its files are already durable under their final names."""
        write_file(self._record_path(record.source), _to_bytes(record.to_json()), below=self._output)

    def clear(self) -> None:
        """Remove every file that an earlier conversion put down as its own, and the records; nothing else.

        Raises OutputError where what is put down leads elsewhere, or to what is no file.
        """
        known = self.conversion()
        if known is None:
            return
        records = [self._record_path(shard).relative_to(self._output).as_posix() for shard in known.shards]
        remove_files(self._output, [*known.files, *records])
        for directory in (self.partial_directory, self.calibration_directory):
            remove_tree(directory, self._output)
        for directory in (self._records, self._sidecars):
            with suppress(OSError):  # there may be something else in it
                directory.rmdir()
        # Last, so that a kill half-way leaves a directory that still says what is ours.
        remove_files(self._output, [self._conversion_path.relative_to(self._output).as_posix()])

    def _record_path(self, shard: ShardSource) -> Path:
        return self._records / f"{shard.output.removesuffix('.safetensors')}.json"

    def _refuse_foreign_files(self, conversion: Conversion) -> None:
        ours = [self._output / name for name in conversion.files]
        ours += [self._record_path(shard) for shard in conversion.shards] + [self.partial_directory]
        for path in ours:
            if os.path.lexists(path):
                raise OutputError(
                    f"{path} exists and was not written by int8cli",
                    hint="Choose another directory: int8cli replaces only its own files.",
                )


def _refuse_mismatch(output: Path, known: Conversion, wanted: Conversion) -> None:
    before, now = _fields(known), _fields(wanted)
    field = next(name for name in now if before.get(name) != now[name])
    raise SettingsMismatchError(
        f"{output} holds a conversion with {field} {_shown(before.get(field))}; this one has {_shown(now[field])}",
        hint="Use the same settings to resume, start over, or choose another directory.",
    )


def _shown(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(repr, value)) or "none"
    return repr(value)


def _fields(conversion: Conversion) -> dict[str, object]:
    """What a mismatch can be named by, the plainest first."""
    fields: dict[str, object] = {"model": conversion.source.name, "revision": conversion.source.revision}
    fields.update(asdict(conversion.settings))
    fields["on_hub"] = conversion.source.on_hub
    for shard in conversion.shards:
        fields[f"source shard {shard.file}"] = f"{shard.size_bytes:,} bytes, {shard.fingerprint}"
    fields["plan (as config.json and this version of int8cli make it)"] = conversion.plan
    fields["shards"] = [shard.output for shard in conversion.shards]
    fields["files"] = list(conversion.files)
    return fields


def _to_bytes(data: Any) -> bytes:
    return (json.dumps(data, indent=1) + "\n").encode()


def _size_of(path: Path) -> int:
    return path.stat().st_size if os.path.isfile(path) else -1
