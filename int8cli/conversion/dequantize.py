"""From a conversion back to floats: one shard after the other, then the files that describe the whole.

Owns the order of the work, what makes it resumable, and the digest that tells one restoration from another. Prints
nothing; reports to a Progress.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from int8cli.checkpoint.config_file import CONFIG_FILE, read_config
from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.disk import reading_errors
from int8cli.checkpoint.header import encode_header
from int8cli.checkpoint.lock import locked
from int8cli.checkpoint.output_names import OWN_DIRECTORY
from int8cli.checkpoint.own_files import name_aside, remove_tree
from int8cli.checkpoint.reader import read_small
from int8cli.checkpoint.tensor import TORCH_NAMES, ShardContents, StoredTensor, TensorSpec
from int8cli.checkpoint.weight_files import find_weights, read_headers
from int8cli.checkpoint.writer import ShardWriter, copy_file, free_bytes, write_file
from int8cli.conversion.buffers import bytes_of
from int8cli.conversion.float_blocks import FloatTensor, float_blocks, written_spec
from int8cli.conversion.recorded import require_as_recorded
from int8cli.errors import DiskSpaceError, PlaceError, SettingsMismatchError, UnsupportedModelError
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.fused_experts import FusedTensor, fused_tensors
from int8cli.planning.output_files import CARD_FILE, INDEX_FILE
from int8cli.planning.plan import make_plan
from int8cli.progress import Progress
from int8cli.records.conversion import Conversion
from int8cli.records.entries import PARTIAL
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore
from int8cli.results.dequantization import Dequantization
from int8cli.results.units import human_bytes
from int8cli.runtime.converted import Converted, find_converted
from int8cli.runtime.converted_tensors import ConvertedTensors

TASK = "dequantize"
STATE_FILE = f"{OWN_DIRECTORY}/dequantization.json"
_STATE_SCHEMA = "int8cli.dequantization/1"
_PARTIAL = f"{OWN_DIRECTORY}/{PARTIAL}"


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file of the output: its name, its header's bytes, where its tensors lie and what they are."""

    file: str
    header: bytes
    places: tuple[StoredTensor, ...]
    tensors: Mapping[str, FloatTensor]

    @property
    def size_bytes(self) -> int:
        return self.places[-1].end_bytes if self.places else len(self.header)


def dequantize(
    directory: Path, conversion: Conversion, output: Path, dtype: str | None, progress: Progress
) -> Dequantization:
    """Write the conversion in `directory` as floats into `output`: as the source's dtypes, or with floats in `dtype`.

    Raises OutputError for an output that holds something else, SettingsMismatchError for another restoration,
    DiskSpaceError, UnsupportedModelError for a directory whose records are not whole, and what reading raises.
    """
    source = DirectorySource(directory, output=output)
    if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(directory / OWN_DIRECTORY)):
        raise PlaceError(f"{output} is inside {directory / OWN_DIRECTORY}", hint="Choose another directory.")
    weights = find_weights(source)
    contents = read_headers(source, weights)
    converted = find_converted(source, contents)
    if converted is None:
        raise UnsupportedModelError(f"{directory} has no int8 weights", hint="Give a directory that convert wrote.")
    records = _records(directory, conversion)
    require_as_recorded(records, converted)
    config = read_config(source)
    shards = tuple(_shards(records, contents, converted, config, dtype))
    with locked(output, output / OWN_DIRECTORY):
        _claim(output, directory, records, dtype)
        remove_tree(output / _PARTIAL, output)  # of a run that was killed: its space is counted as needed below
        finished = {shard.file for shard in shards if _size_of(output / shard.file) == shard.size_bytes}
        _require_room(output, sum(shard.size_bytes for shard in shards if shard.file not in finished))
        progress.begin(TASK, {shard.file: shard.size_bytes for shard in shards}, finished=finished)
        with closing(ConvertedTensors(source, converted)) as tensors:
            for shard in shards:
                if shard.file not in finished:
                    _write_shard(tensors, shard, output, progress)
        for name in weights.copied:
            if name != CARD_FILE:
                with source.fetch(name) as local:
                    copy_file(local.path, output / name, below=output)
        if len(shards) > 1:
            write_file(output / INDEX_FILE, _json_bytes(_index(shards, weights.index_metadata)), below=output)
        write_file(output / CONFIG_FILE, _json_bytes(_config(config, dtype)), below=output)
        remove_tree(output / _PARTIAL, output)
        progress.done(TASK)
    return _result(shards, finished, directory, output)


def _result(shards: Sequence[_Shard], finished: set[str], directory: Path, output: Path) -> Dequantization:
    restored = [tensor for shard in shards for tensor in shard.tensors.values() if tensor.quantized]
    return Dequantization(
        source=str(directory),
        output=str(output),
        restored_layers=sum(tensor.int8_tensors for tensor in restored),
        output_bytes=sum(shard.size_bytes for shard in shards),
        shards=len(shards),
        shards_already_there=len(finished),
        dtypes=tuple(sorted({TORCH_NAMES[tensor.spec.dtype] for tensor in restored})),
    )


def _records(directory: Path, conversion: Conversion) -> tuple[ShardRecord, ...]:
    store = RecordStore(directory)
    records = [store.record(shard) for shard in conversion.shards]
    missing = [shard.output for shard, record in zip(conversion.shards, records, strict=True) if record is None]
    if missing:
        raise UnsupportedModelError(
            f"{directory} is not a finished conversion: {missing[0]} has no record",
            hint="Run the conversion to its end first.",
        )
    return tuple(record for record in records if record is not None)


def _shards(
    records: Sequence[ShardRecord],
    contents: Sequence[ShardContents],
    converted: Converted,
    config: Mapping[str, Any],
    dtype: str | None,
) -> Iterator[_Shard]:
    """What each shard becomes. The records say what its source held: dtypes, shapes, by the names what is turned."""
    specs = [spec for record in records for spec in record.source_tensors]
    turned = {each.spec.name for each in make_plan(specs, config, PlanOptions()).decisions if each.transpose}
    by_name = {each.file_name: each for each in contents}
    for record in records:
        file = record.source.output
        tensors = {}
        for spec in record.source_tensors:
            quantized = spec.name in converted.scales
            shape = converted.specs[spec.name].shape
            transpose = quantized and (spec.name in turned or shape != spec.shape)
            if (shape[::-1] if transpose else shape) != spec.shape:
                raise UnsupportedModelError(
                    f"{spec.name} is {list(shape)} in {file}, its record has {list(spec.shape)}",
                    hint="The directory is damaged or was edited: convert the model again.",
                )
            tensors[spec.name] = FloatTensor(written_spec(_as_stored(spec, converted), dtype), quantized, transpose)
        for fused in fused_tensors((each.spec for each in tensors.values()), config):
            tensors[fused.spec.name] = _fused(fused, {name: tensors.pop(name) for name in fused.names})
        header, places = encode_header([each.spec for each in tensors.values()], by_name[file].metadata)
        yield _Shard(file, header, places, tensors)


def _fused(fused: FusedTensor, parts: Mapping[str, FloatTensor]) -> FloatTensor:
    """A tensor of experts that transformers' class has only fused, from the matrices of the conversion."""
    turned = {name: replace(part, transpose=fused.transposed) for name, part in parts.items()}
    quantized = any(part.quantized for part in parts.values())
    return FloatTensor(
        fused.spec, quantized, parts=tuple(tuple(turned[name] for name in expert) for expert in fused.parts)
    )


def _as_stored(spec: TensorSpec, converted: Converted) -> TensorSpec:
    """A tensor that was only copied keeps the dtype in which it was written; an int8 one has that of its source."""
    if spec.name in converted.scales:
        return spec
    return TensorSpec(spec.name, converted.specs[spec.name].dtype, spec.shape)


def _write_shard(tensors: ConvertedTensors, shard: _Shard, output: Path, progress: Progress) -> None:
    progress.advance(TASK, shard.file, 0)
    writer = ShardWriter(output / _PARTIAL / shard.file, shard.size_bytes, output)
    try:
        writer.write_at(0, shard.header)
        progress.advance(TASK, shard.file, len(shard.header))
        for place in shard.places:
            offset = place.offset_bytes
            for block in float_blocks(tensors, shard.tensors[place.spec.name]):
                writer.write_at(offset, bytes_of(block.reshape(-1).view(torch.uint8)))
                offset += block.nbytes
                progress.advance(TASK, shard.file, block.nbytes, place.spec.name)
        writer.commit(output / shard.file)
    except BaseException:
        writer.abandon()
        raise
    progress.done(TASK, shard.file, human_bytes(shard.size_bytes))


def _claim(output: Path, directory: Path, records: Sequence[ShardRecord], dtype: str | None) -> None:
    """Put down what this directory is, or hold that to what it is already."""
    digest = xxhash.xxh3_128(json.dumps([asdict(file) for each in records for file in each.files]).encode())
    state = {"schema": _STATE_SCHEMA, "source": directory.name, "tensors": digest.hexdigest(), "dtype": dtype}
    path = output / STATE_FILE
    if os.path.lexists(path):
        with reading_errors(path):
            known = read_small(path)
        if known != _json_bytes(state):
            raise SettingsMismatchError(
                f"{output} holds another model in floats, or this one in another dtype",
                hint="Choose another directory, or delete this one.",
            )
        return
    there = [name for name in os.listdir(output) if name != OWN_DIRECTORY] + os.listdir(output / OWN_DIRECTORY)
    unfinished = name_aside(path.name, prefix=".", suffix=".partial")  # of a run that was killed here
    there = [name for name in there if name != unfinished]
    if there:
        raise PlaceError(f"{output} is not empty: it holds {there[0]}", hint="Choose another directory.")
    write_file(path, _json_bytes(state), below=output)


def _require_room(output: Path, wanted_bytes: int) -> None:
    free = free_bytes(output)
    if free < wanted_bytes:
        raise DiskSpaceError(
            f"{output}: {human_bytes(wanted_bytes)} are needed, {human_bytes(free)} are free",
            hint="Free some space, or choose a directory on another disk.",
        )


def _index(shards: Sequence[_Shard], metadata: Mapping[str, Any]) -> dict[str, Any]:
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    total = sum(place.spec.nbytes for shard in shards for place in shard.places)
    return {"metadata": {**metadata, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _config(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    result = {key: value for key, value in config.items() if key != "quantization_config"}
    if dtype is not None:
        result["dtype" if "dtype" in result else "torch_dtype"] = TORCH_NAMES[dtype]
    return result


def _size_of(path: Path) -> int:
    return path.stat().st_size if os.path.isfile(path) and not os.path.islink(path) else -1


def _json_bytes(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
