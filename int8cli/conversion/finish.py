"""The files that describe a whole conversion: report, model card, index, digests and config.json.

Owns the content of these files and the order in which they are written. config.json is written last, because loaders
do not open a directory without one.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from int8cli.checkpoint.config_file import CONFIG_FILE
from int8cli.checkpoint.tensor import TORCH_NAMES, TensorSpec
from int8cli.checkpoint.writer import write_file
from int8cli.conversion.resumed_smoothing import require_fitting
from int8cli.conversion.side_files import complete_manifest, side_file_names
from int8cli.errors import CheckpointError, OutputError, SourceError
from int8cli.planning.decisions import Plan
from int8cli.planning.output_files import CARD_FILE, INDEX_FILE, REPORT_FILE
from int8cli.planning.quantized import without_quantization
from int8cli.planning.survey import Survey, group_by_kind
from int8cli.records.conversion import Conversion, Settings
from int8cli.records.manifest import write_manifest
from int8cli.records.shard_record import ShardRecord
from int8cli.results.conversion import ConversionReport, worst_first

RenderCard = Callable[[ConversionReport, Survey], str]


def write_conclusion(
    survey: Survey,
    conversion: Conversion,
    records: list[ShardRecord],
    output: Path,
    render_card: RenderCard,
    aside: Path | None = None,
) -> ConversionReport:
    """Write these files into `output`, where all shards are in place. `records` are in the order of the shards.

    `aside` as in `write_file`.
    """
    require_fitting(output, records)
    write = partial(write_file, below=output, aside=aside)
    plan = _plan_as_converted(survey, records)
    report = conversion_report(survey, conversion, records)
    write(output / REPORT_FILE, _json_bytes(report.to_json()))
    write(output / CARD_FILE, render_card(report, survey).encode(errors="backslashreplace"))
    if len(records) > 1:
        write(output / INDEX_FILE, _json_bytes(_index(survey, records)))
    config = _json_bytes(_config(survey, conversion.settings, plan)) if survey.has_config else None
    on_disk = [name for name in side_file_names(conversion) if name != CONFIG_FILE]
    write_manifest(output, on_disk, {CONFIG_FILE: config} if config is not None else {}, aside=aside)
    if config is not None:
        write(output / CONFIG_FILE, config)
    return report


def is_concluded(output: Path, conversion: Conversion) -> bool:
    """Whether the files beside the shards are there, and are what their manifest says. Reads them."""
    try:
        return all(file.is_at(output / file.file) for file in complete_manifest(output, conversion))
    except (OutputError, SourceError, CheckpointError):
        return False


def _plan_as_converted(survey: Survey, records: list[ShardRecord]) -> Plan:
    return survey.plan.with_copied([weight.tensor for record in records for weight in record.non_finite])


def conversion_report(survey: Survey, conversion: Conversion, records: list[ShardRecord]) -> ConversionReport:
    """The report on the shards of a survey, which may be some of the conversion's. `records` are theirs, in order."""
    plan = _plan_as_converted(survey, records)
    return ConversionReport(
        model=conversion.source.name,
        revision=conversion.source.revision,
        settings=asdict(conversion.settings),
        layers=worst_first(layer for record in records for layer in record.layers),
        left_alone=group_by_kind(plan.copied),
        passed_over=survey.passed_over,
        unmatched_patterns=plan.unmatched_patterns,
        parameters=plan.parameters,
        source_bytes=survey.source_bytes,
        output_bytes=sum(record.files[0].size_bytes for record in records),
        shards=len(records),
        sidecar_bytes=sum(file.size_bytes for record in records for file in record.files[1:]),
    )


def _index(survey: Survey, records: list[ShardRecord]) -> dict[str, Any]:
    shards = [record.files[0] for record in records]
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total_size = sum(TensorSpec(t.name, t.dtype, t.shape).nbytes for shard in shards for t in shard.tensors)
    metadata = {**survey.weights.index_metadata, "total_size": total_size}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _config(survey: Survey, settings: Settings, plan: Plan) -> dict[str, Any]:
    """The source's config.json with its quantization_config replaced by that of the output.

    If the config does not name a dtype, loaders use that of the first float tensor, which in the output is a float32
    scale. Therefore the model's dtype is added.
    """
    config = without_quantization(survey.config)
    if config.get("dtype") is None and config.get("torch_dtype") is None and plan.dtype is not None:
        config["torch_dtype"] = TORCH_NAMES[plan.dtype]
    config["quantization_config"] = survey.target.quantization_config(plan, settings.threshold)
    return config


def _json_bytes(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
