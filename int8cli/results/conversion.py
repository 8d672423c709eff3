"""What a conversion found out: figures by layer, by kind of layer and in total, and their JSON form.

Owns the schema of the report. Written by convert, kept in the records, read by everything that shows it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from int8cli.llm_int8.metrics import ErrorSums

# 2: the figures are null where they were not measured.
REPORT_SCHEMA = "int8cli.report/2"

ErrorBasis = Literal["measured", "predicted"]


@dataclass(frozen=True, slots=True)
class StoredColumn:
    """An input column kept exact, and what speaks for it, as far as that is known.

    `absmax` is the largest |x| that was seen in it; `error_share` the part of the layer's squared output error, with
    int8 weights, that its rounding makes; `suspicion` a score from weights alone.
    """

    index: int
    absmax: float | None = None
    error_share: float | None = None
    suspicion: float | None = None


@dataclass(frozen=True, slots=True)
class RelativeOutputError:
    """Relative error of a linear's output, ||error|| / ||X Wᵀ||: every column in int8, or the stored ones exact.

    The inputs are int8 too. A prediction for the stored ones is an upper bound: it takes the largest value left in the
    inputs for the largest of every token.
    """

    all_int8: float
    with_stored: float


@dataclass(frozen=True, slots=True)
class StoredColumns:
    """The columns of a linear that its sidecar holds in the source's dtype; `chosen_from` says what they were told by.

    `bytes` are those of both sidecar tensors. Without calibration there is no prediction, and nothing was measured.
    """

    chosen_from: str
    columns: tuple[StoredColumn, ...]
    bytes: int
    predicted: RelativeOutputError | None = None
    measured: RelativeOutputError | None = None

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(column.index for column in self.columns)

    @property
    def heaviest_first(self) -> tuple[StoredColumn, ...]:
        """The columns by their share of the error or their suspicion, whatever is known."""
        return tuple(sorted(self.columns, key=lambda column: -(column.error_share or column.suspicion or 0.0)))

    def output_error(self, basis: "ErrorBasis") -> RelativeOutputError | None:
        return self.measured if basis == "measured" else self.predicted

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StoredColumns":
        predicted, measured = (
            RelativeOutputError(**data[name]) if data[name] else None for name in ("predicted", "measured")
        )
        columns = tuple(StoredColumn(**column) for column in data["columns"])
        return cls(data["chosen_from"], columns, data["bytes"], predicted, measured)


NOTHING_STORED = StoredColumns("", (), 0)


# The figures of a layer, of what layers make together, and those that all others follow from.
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
_FIGURES_TOGETHER = ("relative_frobenius_error", "sqnr_db", "max_abs_error", "mean_range_use")
_ADDED_UP = tuple(name for name in ErrorSums.__slots__ if name != "numel")


def _figures(sums: ErrorSums | None, names: tuple[str, ...]) -> dict[str, float | None]:
    """These figures by name; None for each where nothing was measured."""
    return {name: getattr(sums, name) if sums is not None else None for name in names}


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One quantized linear. `shape` is (out_features, in_features); bytes are those of its tensors that loaders see.

    `sums` is None where its error was not measured. `stored` speaks of its sidecar, None where the conversion makes
    none.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    source_dtype: str
    bytes_before: int
    bytes_after: int
    sums: ErrorSums | None
    stored: StoredColumns | None = None

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
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "LayerReport":
        shape = (int(data["shape"][0]), int(data["shape"][1]))
        added_up = {name: data[name] for name in _ADDED_UP}
        measured = any(value is not None for value in added_up.values())
        sums = ErrorSums(math.prod(shape), **added_up) if measured else None
        before, after = data["bytes_before"], data["bytes_after"]
        stored = StoredColumns.from_json(data["stored_columns"]) if data.get("stored_columns") else None
        return cls(data["name"], data["kind"], shape, data["source_dtype"], before, after, sums, stored)


@dataclass(frozen=True, slots=True)
class KindSummary:
    """All layers of one kind together: their errors over all their weights, and the worst of them, if measured."""

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
            **_figures(self.sums, _FIGURES_TOGETHER),
            "worst_layer": self.worst.name if self.worst is not None else None,
        }


@dataclass(frozen=True, slots=True)
class StoredKind:
    """The stored columns of the layers of one kind; of `layers`, those are counted that have any.

    `bytes` are those of the sidecar tensors. `error` is the mean over the layers where one is known.
    """

    kind: str
    layers: int
    columns: int
    bytes: int
    error: RelativeOutputError | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StoredSummary:
    """The stored columns of a conversion: in all, and by kind with the largest output error first.

    `basis` says what all errors here are: measured where every layer of which anything is known was measured, or else
    predicted; None where nothing is known of the activations.
    """

    total: StoredKind
    kinds: tuple[StoredKind, ...]
    basis: ErrorBasis | None

    def to_json(self) -> dict[str, Any]:
        total = {key: value for key, value in self.total.to_json().items() if key != "kind"}
        kinds = [kind.to_json() for kind in self.kinds]
        return {**total, "error_basis": self.basis, "kinds": kinds}


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors of one kind that share their fate, and the reason for it. `bytes` are those of the source."""

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
    """The whole report of a conversion. Holds nothing that differs between two runs of the same conversion.

    `layers` come worst first, by relative Frobenius error, or by name where that was not measured. `passed_over` names
    each file of the source that was neither converted nor copied, with the reason. `unmatched_patterns` are the --skip
    and --only patterns that named nothing.
    `output_bytes` are those of the shards, `sidecar_bytes` those of the files beside them that hold stored columns.
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
        """Over all layers; None where the errors were not to be measured."""
        return _total(self.layers) if self.settings["figures"] else None

    @property
    def stored(self) -> StoredSummary | None:
        """What was stored exactly; None where the conversion makes no sidecars."""
        return summarize_stored(self.layers)

    def to_json(self) -> dict[str, Any]:
        stored = self.stored
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
                **_figures(self.sums, _FIGURES_TOGETHER),
            },
            "stored_columns": stored.to_json() if stored is not None else None,
            "kinds": [kind.to_json() for kind in summarize_kinds(self.layers)],
            "layers": [layer.to_json() for layer in self.layers],
            "left_alone": [kept.to_json() for kept in self.left_alone],
            "passed_over": [{"file": file, "reason": reason} for file, reason in self.passed_over],
            "unmatched_patterns": list(self.unmatched_patterns),
        }


def worst_first(layers: Iterable[LayerReport]) -> tuple[LayerReport, ...]:
    """The layers by their errors, the largest first; by name where these were not measured."""
    return tuple(sorted(layers, key=lambda layer: (-_error(layer.sums), layer.name)))


def _error(sums: ErrorSums | None) -> float:
    return sums.relative_frobenius_error if sums is not None else 0.0


def worst_by_output_error(
    layers: Iterable[LayerReport], basis: ErrorBasis
) -> tuple[tuple[LayerReport, RelativeOutputError], ...]:
    """The layers whose output error is known, the largest with all columns in int8 first."""
    known = [(each, error) for each in layers if each.stored and (error := each.stored.output_error(basis))]
    return tuple(sorted(known, key=lambda pair: (-pair[1].all_int8, pair[0].name)))


def summarize_kinds(layers: Iterable[LayerReport]) -> tuple[KindSummary, ...]:
    """Group layers by kind, the kind with the largest error first; by name where none was measured."""
    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(layer.kind, []).append(layer)
    summaries = [_summarize(kind, members) for kind, members in groups.items()]
    return tuple(sorted(summaries, key=lambda kind: (-_error(kind.sums), kind.kind)))


def summarize_stored(layers: Iterable[LayerReport]) -> StoredSummary | None:
    """The stored columns of these layers; None where there are no sidecars."""
    found = [(layer.kind, layer.stored) for layer in sorted(layers, key=lambda layer: layer.name) if layer.stored]
    if not found:
        return None
    basis = _basis([stored for _, stored in found])
    groups: dict[str, list[StoredColumns]] = {}
    for kind, stored in found:
        groups.setdefault(kind, []).append(stored)
    kinds = [_stored_kind(kind, members, basis) for kind, members in groups.items()]
    kinds.sort(key=lambda kind: (-(kind.error.all_int8 if kind.error else 0.0), kind.kind))
    return StoredSummary(_stored_kind("", [stored for _, stored in found], basis), tuple(kinds), basis)


def _basis(stored: list[StoredColumns]) -> ErrorBasis | None:
    known = [each for each in stored if each.measured or each.predicted]
    if not known:
        return None
    return "measured" if all(each.measured for each in known) else "predicted"


def _stored_kind(kind: str, members: list[StoredColumns], basis: ErrorBasis | None) -> StoredKind:
    errors = [error for each in members if basis is not None and (error := each.output_error(basis))]
    mean = None
    if errors:
        mean = RelativeOutputError(
            math.fsum(error.all_int8 for error in errors) / len(errors),
            math.fsum(error.with_stored for error in errors) / len(errors),
        )
    return StoredKind(
        kind=kind,
        layers=sum(1 for each in members if each.columns),
        columns=sum(len(each.columns) for each in members),
        bytes=sum(each.bytes for each in members),
        error=mean,
    )


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
    """The sums over layers; None where one of them was not measured."""
    total = ErrorSums()
    # Sorted by name: a float sum depends on its order, and a report must not depend on which shard finished first.
    for layer in sorted(layers, key=lambda layer: layer.name):
        if layer.sums is None:
            return None
        total += layer.sums
    return total
