"""The input columns that a conversion stores exactly: of a linear, of a kind of layer, in all; and their JSON form."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

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


NOTHING_STORED = StoredColumns("", (), 0)


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


def summarize_columns(found: Sequence[tuple[str, StoredColumns]]) -> StoredSummary | None:
    """The stored columns of layers, each with the kind of its layer; None where there are none.

    Float sums depend on the order: it must be that of the layers' names.
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
