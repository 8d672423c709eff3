"""Checks that the files that describe the shards agree with them: records, index, config.json, report and others.

Owns the comparison of JSON documents. Reads no weights.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from int8cli.checkpoint.config_file import CONFIG_FILE
from int8cli.checkpoint.reader import read_small
from int8cli.checkpoint.tensor import CAST_ON_LOAD, QUANTIZABLE_DTYPES, TensorSpec
from int8cli.conversion.side_files import side_file_names
from int8cli.errors import Int8cliError
from int8cli.loaders.expressions import MATCHES_AT_MOST, slow
from int8cli.planning.decisions import Plan
from int8cli.planning.output_files import INDEX_FILE, REPORT_FILE
from int8cli.records.conversion import ABSMAX_INPUTS, NO_SMOOTHING, Conversion
from int8cli.records.manifest import MANIFEST_FILE, SideFile
from int8cli.records.shard_record import ShardRecord, TensorRecord
from int8cli.results.conversion import LayerReport, summarize_stored, worst_first
from int8cli.results.smoothing import summarize_smoothing
from int8cli.results.verification import Failure
from int8cli.typed_json import InvalidJsonError, inside, parse_json, read_as, shown
from int8cli.verification.declared import misstated
from int8cli.verification.layout import target_of

SINGLE_FILES = ("model.safetensors", INDEX_FILE)


def record_failures(conversion: Conversion, records: Mapping[str, ShardRecord]) -> Iterator[Failure]:
    """Check that each shard of the conversion has its record, and that no tensor is in two of them."""
    seen: dict[str, str] = {}
    for shard in conversion.shards:
        record = records.get(shard.file)
        if record is None:
            yield Failure(shard.output, "has no record")
            continue
        if record.source != shard:
            yield Failure(shard.output, "its record names another source file")
        if not record.files or record.files[0].file != shard.output:
            yield Failure(shard.output, "its record names another output file")
        for layer in record.layers:
            if (layer.sums is not None) != conversion.settings.figures:
                stated = (
                    "has error figures, although none were measured"
                    if layer.sums
                    else "has no error figures in its record"
                )
                yield Failure(shard.output, stated, layer.name)
        for file in record.files:
            for tensor in file.tensors:
                if tensor.name in seen:
                    yield Failure(file.file, f"is in {seen[tensor.name]} too", tensor.name)
                seen[tensor.name] = file.file


def tensor_failures(conversion: Conversion, records: Sequence[ShardRecord]) -> Iterator[Failure]:
    """Check that each tensor of the source became the right tensors of the layout: none missing, none extra."""
    target = target_of(conversion)
    for record in records:
        shard = record.files[0]
        layers = {f"{layer.name}.weight": layer for layer in record.layers}
        expected: dict[str, TensorSpec] = {}
        for spec in record.source_tensors:
            layer = layers.pop(spec.name, None)
            if layer and len(spec.shape) != 2:
                yield Failure(
                    shard.file, f"is reported as quantized, but was {list(spec.shape)} in the source", spec.name
                )
                continue
            made = target.quantized_specs(spec, transpose=_is_transposed(spec, layer)) if layer else (spec,)
            expected.update((each.name, each) for each in made)
        for name in layers:
            yield Failure(shard.file, "is reported as quantized, but is missing from the source", name)
        for tensor in shard.tensors:
            due = expected.pop(tensor.name, None)
            if due is None:
                yield Failure(shard.file, "does not come from a tensor of the source", tensor.name)
            elif (tensor.dtype, tensor.shape) != (due.dtype, due.shape) and not _is_cast(due, tensor):
                was = f"is {tensor.dtype} {list(tensor.shape)}, not {due.dtype} {list(due.shape)}"
                yield Failure(shard.file, was, tensor.name)
        for name in expected:
            yield Failure(shard.file, "is missing", name)


def _is_cast(source: TensorSpec, written: TensorRecord) -> bool:
    """Whether a float tensor is in another float dtype. `convert` casts those that loaders would cast anyway."""
    return source.shape == written.shape and source.dtype in CAST_ON_LOAD and written.dtype in QUANTIZABLE_DTYPES


def _is_transposed(source: TensorSpec, layer: LayerReport | None) -> bool:
    return layer is not None and layer.shape != source.shape


def index_failures(directory: Path, records: Sequence[ShardRecord]) -> Iterator[Failure]:
    """Check that the index, if there must be one, lists every tensor with the right shard, and nothing else."""
    shards = [record.files[0] for record in records]
    if len(shards) == 1:
        return
    try:
        index = _read_object(directory / INDEX_FILE)
    except Int8cliError as error:
        yield Failure(INDEX_FILE, str(error))
        return
    named = index.get("weight_map")
    if not isinstance(named, dict):
        yield Failure(INDEX_FILE, "has no weight_map")
        return
    actual = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    for extra in sorted({str(file) for file in named.values()} - {shard.file for shard in shards}):
        yield Failure(INDEX_FILE, f"names {extra}, which does not belong to this conversion")
    for name, file in actual.items():
        if name not in named:
            yield Failure(INDEX_FILE, "is missing", name)
        elif named[name] != file:
            yield Failure(INDEX_FILE, f"should be in {file}, but is listed in {named[name]}", name)
    for name in named.keys() - actual.keys():
        yield Failure(INDEX_FILE, "is listed, but no shard has it", name)
    total = sum(TensorSpec(t.name, t.dtype, t.shape).nbytes for shard in shards for t in shard.tensors)
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated != total:
        yield Failure(INDEX_FILE, f"total_size is {stated}, the tensors have {total} bytes")


def config_failures(directory: Path, conversion: Conversion, records: Sequence[ShardRecord]) -> Iterator[Failure]:
    """Check that quantization_config follows from the settings and does not skip any int8 layer."""
    settings, target = conversion.settings, target_of(conversion)
    try:
        stated = _read_object(directory / CONFIG_FILE).get("quantization_config")
    except Int8cliError as error:
        yield Failure(CONFIG_FILE, str(error))
        return
    if not isinstance(stated, dict):
        yield Failure(CONFIG_FILE, "has no quantization_config")
        return
    wanted = target.quantization_config(Plan(()), settings.threshold)
    entries = stated.get(target.SKIP_KEY)
    for key in sorted((wanted.keys() | stated.keys()) - {target.SKIP_KEY}):
        if stated.get(key) != wanted.get(key):
            yield Failure(CONFIG_FILE, f"quantization_config.{key} is {stated.get(key)!r}, not {wanted.get(key)!r}")
    if all(stated.get(key) == value for key, value in wanted.items() if key != target.SKIP_KEY):
        yield from (Failure(CONFIG_FILE, problem) for problem in misstated(stated, settings))
    if not (isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)):
        yield Failure(CONFIG_FILE, f"quantization_config.{target.SKIP_KEY} is {entries!r}, not a list of names")
        return
    layers = [layer for record in records for layer in record.layers]
    listed = f"quantization_config.{target.SKIP_KEY}"
    if len(entries) * len(layers) > MATCHES_AT_MOST:
        yield Failure(CONFIG_FILE, f"{listed} has {len(entries):,} entries, which is too many to check")
        return
    unmatched = set(slow(entries, [layer.name for layer in layers]))
    for entry in sorted(unmatched):
        yield Failure(CONFIG_FILE, f"{listed}: {shown(entry)} could take years to match, so it was not checked")
    for entry in (entry for entry in entries if entry not in unmatched):  # `re` remembers only some of them at a time
        for layer in layers:
            if target.leaves_alone(entry, layer.name):
                yield Failure(CONFIG_FILE, f"{listed}: {entry!r} covers a layer that is in int8", layer.name)


def report_failures(directory: Path, conversion: Conversion, records: Sequence[ShardRecord]) -> Iterator[Failure]:
    """Check that the report agrees with the records: source, settings, totals, and the figures of every layer."""
    try:
        report = _read_report(directory / REPORT_FILE)
    except Int8cliError as error:
        yield Failure(REPORT_FILE, str(error))
        return
    report["settings"].setdefault("figures", True)  # earlier versions always measured them
    report["settings"].setdefault("smooth", NO_SMOOTHING)  # and smoothed nothing
    report["settings"].setdefault("inputs", ABSMAX_INPUTS)
    layers = worst_first(layer for record in records for layer in record.layers)
    settings = json.loads(json.dumps(asdict(conversion.settings)))
    stored, smoothing = summarize_stored(layers), summarize_smoothing(layer.smoothing for layer in layers)
    head = {
        "model": conversion.source.name,
        "revision": conversion.source.revision,
        "settings": settings,
        "stored_columns": json.loads(json.dumps(stored.to_json())) if stored is not None else None,
        "smoothing": json.loads(json.dumps(smoothing.to_json())) if smoothing is not None else None,
    }
    totals = {
        "shards": len(records),
        "output_bytes": sum(record.files[0].size_bytes for record in records),
        "sidecar_bytes": sum(file.size_bytes for record in records for file in record.files[1:]),
        "parameters": sum(spec.numel for record in records for spec in record.source_tensors),
        "quantized_layers": len(layers),
    }
    yield from _differences(head, report)
    yield from _differences(totals, report["totals"])
    stated = {layer["name"]: layer for layer in report["layers"]}
    for each in stated.values():
        each.setdefault("smoothing", None)
    for layer in layers:
        if stated.pop(layer.name, None) != json.loads(json.dumps(layer.to_json())):
            yield Failure(REPORT_FILE, "its figures differ from its record", layer.name)
    for name in stated:
        yield Failure(REPORT_FILE, "has no record", name)


def _differences(wanted: Mapping[str, Any], stated: Mapping[str, Any]) -> Iterator[Failure]:
    for key, value in wanted.items():
        if stated.get(key) != value:
            yield Failure(REPORT_FILE, f"{key} is {stated.get(key)!r}, not {value!r}")


def side_file_failures(directory: Path, conversion: Conversion, manifest: Sequence[SideFile]) -> Iterator[Failure]:
    """Check that the other files are unchanged since they were written, and that there are no extra weights."""
    for recorded in manifest:
        if not os.path.lexists(directory / recorded.file):
            yield Failure(recorded.file, "is missing")
            continue
        try:
            if not recorded.is_at(directory / recorded.file):
                yield Failure(recorded.file, "differs from what was written")
        except Int8cliError as error:
            yield Failure(recorded.file, str(error))
    due, named = set(side_file_names(conversion)), {recorded.file for recorded in manifest}
    for name in sorted(due - named):
        yield Failure(MANIFEST_FILE, f"does not name {name}")
    for name in sorted(named - due):
        yield Failure(MANIFEST_FILE, f"names {name}, which is not a file of this conversion")
    ours = set(conversion.files)
    for path in sorted(directory.glob("*.safetensors")) + [directory / name for name in SINGLE_FILES]:
        if path.name not in ours and path.exists():
            ours.add(path.name)
            yield Failure(path.name, "does not belong to this conversion; a loader might read it as part of the model")


def _read_report(path: Path) -> dict[str, Any]:
    """The report. Its settings and totals are objects, and each of its layers has a name. Raises Int8cliError."""
    report = _read_object(path)
    try:
        for name in ("settings", "totals"):
            _field(report, name, dict[str, Any])
        layers = _field(report, "layers", tuple[dict[str, Any], ...])
        for index, layer in enumerate(layers):
            with inside(f"layers[{index}]"):
                _field(layer, "name", str)
    except InvalidJsonError as error:
        raise Int8cliError(f"is damaged or was edited: {error}") from error
    return report


def _field(value: dict[str, Any], name: str, declared: Any) -> Any:
    with inside(name):
        return read_as(declared, value.get(name))


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises Int8cliError."""
    try:
        data = parse_json(read_small(path))
    except FileNotFoundError as error:
        raise Int8cliError("is missing") from error
    except OSError as error:
        raise Int8cliError(f"cannot be read ({error.strerror})") from error
    except InvalidJsonError as error:
        raise Int8cliError(str(error)) from error
    if not isinstance(data, dict):
        raise Int8cliError(f"contains {type(data).__name__}, not an object")
    return data
