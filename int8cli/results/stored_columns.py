"""The input columns that a conversion stores exactly, by linear, by kind of layer and in total, and their JSON form."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

ErrorBasis = Literal["measured", "predicted"]


@dataclass(frozen=True, slots=True)
class StoredColumn:
    """An input column that is stored exactly, and the evidence for it, where known.

    `absmax` is the largest |x| in it. `error_share` is its rounding's share of the layer's squared output error with
    int8 weights. `suspicion` is a score from the weights alone.
    """

    index: int
    absmax: float | None = None
    error_share: float | None = None
    suspicion: float | None = None


@dataclass(frozen=True, slots=True)
class RelativeOutputError:
    """Relative error of a linear's output, ||error|| / ||X Wᵀ||: every column in int8, or the stored ones exact.

    The inputs are int8 too. A predicted `with_stored` is an upper bound: it assumes that every token reaches the
    largest value that is left in the inputs.
    """

    all_int8: float
    with_stored: float


@dataclass(frozen=True, slots=True)
class StoredColumns:
    """The columns of a linear that its sidecar stores in the source's dtype. `chosen_from` names the strategy.

    `bytes` counts both sidecar tensors. `predicted` and `measured` are None without a calibration.
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
        """The columns sorted by their share of the error or their suspicion, whichever is known."""
        return tuple(sorted(self.columns, key=lambda column: -(column.error_share or column.suspicion or 0.0)))

    def output_error(self, basis: "ErrorBasis") -> RelativeOutputError | None:
        return self.measured if basis == "measured" else self.predicted

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


NOTHING_STORED = StoredColumns("", (), 0)


@dataclass(frozen=True, slots=True)
class StoredKind:
    """The stored columns of the layers of one kind. `layers` counts only layers that have stored columns.

    `bytes` counts the sidecar tensors. `error` is the mean over the layers whose error is known.
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
    """The stored columns of a conversion: in total, and by kind with the largest output error first.

    `basis` says whether all errors here are measured or predicted. They are measured only if every layer with a known
    error was measured. None without a calibration.
    """

    total: StoredKind
    kinds: tuple[StoredKind, ...]
    basis: ErrorBasis | None

    def to_json(self) -> dict[str, Any]:
        total = {key: value for key, value in self.total.to_json().items() if key != "kind"}
        kinds = [kind.to_json() for kind in self.kinds]
        return {**total, "error_basis": self.basis, "kinds": kinds}


def summarize_columns(found: Sequence[tuple[str, StoredColumns]]) -> StoredSummary | None:
    """The summary of stored columns, given with the kinds of their layers; None if there are none.

    They must be sorted by the layers' names, since float sums depend on the order.
    """
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
