"""`int8/report.json`, read back into the objects that it was written from.

Owns what a report on disk must contain. Figures that follow from others are computed again.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from int8cli.records.conversion import Settings
from int8cli.records.documents import read_document, without_schema
from int8cli.results.conversion import REPORT_SCHEMA, ConversionReport, LayerReport, TensorGroup
from int8cli.typed_json import InvalidJsonError, inside, read_as


def read_report_file(path: Path) -> ConversionReport | None:
    """The report of a finished conversion; None if there is no such file. Raises OutputError if it is damaged."""
    return read_document(path, report_from_json, "Run the same convert command again to rewrite it.")


def report_from_json(document: Any) -> ConversionReport:
    """Raises InvalidJsonError for anything that `ConversionReport.to_json` does not write."""
    found = read_as(_Fields, without_schema(document, REPORT_SCHEMA))
    totals = found.totals
    return ConversionReport(
        model=found.model,
        revision=found.revision,
        settings=asdict(found.settings),
        layers=_layers(found.layers),
        left_alone=found.left_alone,
        passed_over=tuple((each.file, each.reason) for each in found.passed_over),
        unmatched_patterns=found.unmatched_patterns,
        parameters=totals.parameters,
        source_bytes=totals.source_bytes,
        output_bytes=totals.output_bytes,
        shards=totals.shards,
        sidecar_bytes=totals.sidecar_bytes,
    )


@dataclass(frozen=True, slots=True)
class _Totals:
    shards: int
    source_bytes: int
    output_bytes: int
    sidecar_bytes: int
    parameters: int
    quantized_parameters: int
    percent_quantized: float
    quantized_layers: int
    relative_frobenius_error: Any
    sqnr_db: Any
    max_abs_error: Any
    mean_range_use: Any


@dataclass(frozen=True, slots=True)
class _PassedOver:
    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Fields:
    """A report as `ConversionReport.to_json` writes it. Summaries are not checked."""

    model: str
    revision: str | None
    settings: Settings
    totals: _Totals
    stored_columns: Any
    kinds: Any
    layers: Any
    left_alone: tuple[TensorGroup, ...]
    passed_over: tuple[_PassedOver, ...]
    unmatched_patterns: tuple[str, ...]
    smoothing: Any = None


def _layers(values: Any) -> tuple[LayerReport, ...]:
    if not isinstance(values, list):
        raise InvalidJsonError("is not a list", "layers")
    layers = []
    for index, value in enumerate(values):
        with inside(f"layers[{index}]"):
            layers.append(LayerReport.from_json(value))
    return tuple(layers)
