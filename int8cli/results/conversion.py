"""The results of a conversion: figures by layer, by kind of layer and in total, and their JSON form.

Owns the schema of the report, and of the layers in a shard's record.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from int8cli.llm_int8.metrics import ErrorSums
from int8cli.results.smoothing import LayerSmoothing, SmoothingSummary, summarize_smoothing
from int8cli.results.stored_columns import (
    ErrorBasis,
    RelativeOutputError,
    StoredColumns,
    StoredSummary,
    summarize_columns,
)
from int8cli.typed_json import InvalidJsonError, read_as

# 2: figures that were not measured are null.
REPORT_SCHEMA = "int8cli.report/2"

# The figures of a layer, those of several layers together, and the sums that all figures are computed from.
_LAYER_FIGURES = (
    "row_absmax_min",
    "row_absmax_max",
    "max_abs_error",
    "relative_frobenius_error",
    "sqnr_db",
    "mean_range_use",
    "sum_squared_error",
    "sum_squared_weight",
    "sum_abs_data",
)
_TOTAL_FIGURES = ("relative_frobenius_error", "sqnr_db", "max_abs_error", "mean_range_use")
_SUMS = tuple(name for name in ErrorSums.__slots__ if name != "numel")


def _figures(sums: ErrorSums | None, names: tuple[str, ...]) -> dict[str, float | None]:
    """These figures by name; all are None if nothing was measured."""
    return {name: getattr(sums, name) if sums is not None else None for name in names}


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One quantized linear. `shape` is (out_features, in_features). Bytes count the tensors that loaders read.

    `sums` is None if the error was not measured. `stored` are the columns in its sidecar, None without sidecars.
    `smoothing` is None if no smoothing was looked for; else all figures are those of the smoothed layer.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    source_dtype: str
    bytes_before: int
    bytes_after: int
    sums: ErrorSums | None
    stored: StoredColumns | None = None
    smoothing: LayerSmoothing | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "source_dtype": self.source_dtype,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            **_figures(self.sums, _LAYER_FIGURES),
            "stored_columns": self.stored.to_json() if self.stored is not None else None,
            "smoothing": self.smoothing.to_json() if self.smoothing is not None else None,
        }

    @classmethod
    def from_json(cls, value: Any) -> "LayerReport":
        """Raises InvalidJsonError for anything that `to_json` does not write."""
        found = read_as(_LayerFields, value)
        sizes = found.bytes_before, found.bytes_after
        sums = found.sums()
        named = found.name, found.kind, found.shape, found.source_dtype
        return cls(*named, *sizes, sums, found.stored_columns, found.smoothing)


@dataclass(frozen=True, slots=True)
class _LayerFields:
    """A layer as `LayerReport.to_json` writes it. Figures that are computed from others are not checked."""

    name: str
    kind: str
    shape: tuple[int, int]
    source_dtype: str
    bytes_before: int
    bytes_after: int
    row_absmax_min: float | None
    row_absmax_max: float | None
    max_abs_error: float | None
    relative_frobenius_error: Any
    sqnr_db: Any
    mean_range_use: Any
    sum_squared_error: float | None
    sum_squared_weight: float | None
    sum_abs_data: float | None
    stored_columns: StoredColumns | None = None
    smoothing: LayerSmoothing | None = None

    def sums(self) -> ErrorSums | None:
        figures = {name: getattr(self, name) for name in _SUMS}
        if all(value is None for value in figures.values()):
            return None
        for name, value in figures.items():
            if value is None:
                raise InvalidJsonError("is null, but other figures are not", name)
        return ErrorSums(math.prod(self.shape), **figures)


@dataclass(frozen=True, slots=True)
class KindSummary:
    """All layers of one kind: the error over all their weights, and the worst of them, if errors were measured."""

    kind: str
    layers: int
    parameters: int
    bytes_before: int
    bytes_after: int
    sums: ErrorSums | None
    worst: LayerReport | None

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "layers": self.layers,
            "parameters": self.parameters,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            **_figures(self.sums, _TOTAL_FIGURES),
            "worst_layer": self.worst.name if self.worst is not None else None,
        }


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors of one kind that are left alone for the same reason. `bytes` counts their bytes in the source."""

    kind: str
    reason: str
    tensors: int
    parameters: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "reason": self.reason,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes": self.bytes,
        }


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """The report of a conversion. Two runs of the same conversion give equal reports.

    `layers` are sorted by relative Frobenius error, the largest first, or by name if that was not measured.
    `passed_over` names each file of the source that was neither converted nor copied, with the reason.
    `unmatched_patterns` are the --skip and --only patterns that matched nothing. `output_bytes` counts the output
    shards, `sidecar_bytes` the files of stored columns.
    """

    model: str
    revision: str | None
    settings: Mapping[str, Any]
    layers: tuple[LayerReport, ...]
    left_alone: tuple[TensorGroup, ...]
    passed_over: tuple[tuple[str, str], ...]
    unmatched_patterns: tuple[str, ...]
    parameters: int
    source_bytes: int
    output_bytes: int
    shards: int
    sidecar_bytes: int = 0

    @property
    def quantized_parameters(self) -> int:
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def percent_quantized(self) -> float:
        return 100.0 * self.quantized_parameters / self.parameters if self.parameters else 0.0

    @property
    def sums(self) -> ErrorSums | None:
        """The error sums over all layers; None if errors were not measured."""
        return _total(self.layers) if self.settings["figures"] else None

    @property
    def stored(self) -> StoredSummary | None:
        """The stored columns; None without sidecars."""
        return summarize_stored(self.layers)

    @property
    def smoothing(self) -> SmoothingSummary | None:
        """What was smoothed; None if no smoothing was looked for."""
        return summarize_smoothing(layer.smoothing for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        stored, smoothing = self.stored, self.smoothing
        return {
            "schema": REPORT_SCHEMA,
            "model": self.model,
            "revision": self.revision,
            "settings": dict(self.settings),
            "totals": {
                "shards": self.shards,
                "source_bytes": self.source_bytes,
                "output_bytes": self.output_bytes,
                "sidecar_bytes": self.sidecar_bytes,
                "parameters": self.parameters,
                "quantized_parameters": self.quantized_parameters,
                "percent_quantized": self.percent_quantized,
                "quantized_layers": len(self.layers),
                **_figures(self.sums, _TOTAL_FIGURES),
            },
            "stored_columns": stored.to_json() if stored is not None else None,
            "smoothing": smoothing.to_json() if smoothing is not None else None,
            "kinds": [kind.to_json() for kind in summarize_kinds(self.layers)],
            "layers": [layer.to_json() for layer in self.layers],
            "left_alone": [group.to_json() for group in self.left_alone],
            "passed_over": [{"file": file, "reason": reason} for file, reason in self.passed_over],
            "unmatched_patterns": list(self.unmatched_patterns),
        }


def worst_first(layers: Iterable[LayerReport]) -> tuple[LayerReport, ...]:
    """The layers sorted by error, the largest first, or by name if errors were not measured."""
    return tuple(sorted(layers, key=lambda layer: (-_error(layer.sums), layer.name)))


def _error(sums: ErrorSums | None) -> float:
    return sums.relative_frobenius_error if sums is not None else 0.0


def worst_by_output_error(
    layers: Iterable[LayerReport], basis: ErrorBasis
) -> tuple[tuple[LayerReport, RelativeOutputError], ...]:
    """The layers whose output error is known, with that error; the largest one with all columns in int8 comes first."""
    known = [(each, error) for each in layers if each.stored and (error := each.stored.output_error(basis))]
    return tuple(sorted(known, key=lambda pair: (-pair[1].all_int8, pair[0].name)))


def summarize_kinds(layers: Iterable[LayerReport]) -> tuple[KindSummary, ...]:
    """Group layers by kind. The kind with the largest error comes first; without errors, kinds are sorted by name."""
    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(layer.kind, []).append(layer)
    summaries = [_summarize(kind, members) for kind, members in groups.items()]
    return tuple(sorted(summaries, key=lambda kind: (-_error(kind.sums), kind.kind)))


def summarize_stored(layers: Iterable[LayerReport]) -> StoredSummary | None:
    """The stored columns of these layers; None without sidecars."""
    by_name = sorted(layers, key=lambda layer: layer.name)
    return summarize_columns([(layer.kind, layer.stored) for layer in by_name if layer.stored])


def _summarize(kind: str, members: list[LayerReport]) -> KindSummary:
    sums = _total(members)
    return KindSummary(
        kind=kind,
        layers=len(members),
        parameters=sum(math.prod(layer.shape) for layer in members),
        bytes_before=sum(layer.bytes_before for layer in members),
        bytes_after=sum(layer.bytes_after for layer in members),
        sums=sums,
        worst=worst_first(members)[0] if sums is not None else None,
    )


def _total(layers: Iterable[LayerReport]) -> ErrorSums | None:
    """The sums over layers; None if one of them was not measured."""
    total = ErrorSums()
    # Sorted by name: a float sum depends on the order, and the report must not depend on which shard finished first.
    for layer in sorted(layers, key=lambda layer: layer.name):
        if layer.sums is None:
            return None
        total += layer.sums
    return total
