"""The powers of two that multiply the tensors of a checkpoint in exact smoothing, and where a sidecar stores them.

Owns the names and shapes of these tensors. A weight's input columns are multiplied by 2^`X.smooth_exponents`, and the
rows of a tensor T that makes a divided input by 2^`T.smooth_row_exponents`. Needs no torch: exponents are the bytes of
int8 values.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from int8cli.checkpoint.tensor import CAST_ON_LOAD, ShardContents, TensorSpec
from int8cli.llm_int8.limits import MAX_EXPONENT
from int8cli.planning.decisions import Decision
from int8cli.results.smoothing import LayerSmoothing

_COLUMNS = ".smooth_exponents"
_ROWS = ".smooth_row_exponents"
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class TensorExponents:
    """The exponents of one tensor, int8 each: of its rows (out_features, or the elements of a vector), of its columns.

    Empty where nothing is scaled. Both are those of a weight as (out_features, in_features), however it is stored.
    """

    rows: bytes = b""
    columns: bytes = b""

    def __or__(self, other: "TensorExponents") -> "TensorExponents":
        """Both together, where they scale different rows."""
        return TensorExponents(_both(self.rows, other.rows), _both(self.columns, other.columns))


NOT_SCALED = TensorExponents()
NOTHING_SCALED: Mapping[str, TensorExponents] = {}


@dataclass(frozen=True, slots=True)
class ShardSmoothing:
    """The exponents of a shard's tensors, by tensor, and what to report on its linear layers, by weight."""

    exponents: Mapping[str, TensorExponents] = field(default_factory=dict)
    layers: Mapping[str, LayerSmoothing] = field(default_factory=dict)


NOT_SMOOTHED = ShardSmoothing()


def exponent_specs(tensor: str, exponents: TensorExponents) -> Iterator[tuple[TensorSpec, bytes]]:
    """The sidecar's tensors for one tensor, with their bytes."""
    if exponents.columns:
        yield TensorSpec(columns_name(tensor), "I8", (len(exponents.columns),)), exponents.columns
    if exponents.rows:
        yield TensorSpec(rows_name(tensor), "I8", (len(exponents.rows),)), exponents.rows


def most_specs(contents: ShardContents, decisions: Mapping[str, Decision]) -> Iterator[TensorSpec]:
    """The tensors of a shard's sidecar if everything that can be scaled is: int8 weights, and vectors of floats."""
    for stored in contents.tensors:
        spec, decision = stored.spec, decisions[stored.spec.name]
        if decision.quantize:
            rows, columns = reversed(spec.shape) if decision.transpose else spec.shape
            whole = TensorExponents(bytes(rows), bytes(columns))
        elif len(spec.shape) == 1 and spec.dtype in CAST_ON_LOAD:
            whole = TensorExponents(bytes(spec.numel))
        else:
            continue
        yield from (each for each, _ in exponent_specs(spec.name, whole))


def columns_name(weight: str) -> str:
    return f"{weight.removesuffix(_WEIGHT)}{_COLUMNS}"


def rows_name(tensor: str) -> str:
    return f"{tensor}{_ROWS}"


def is_exponents(name: str) -> bool:
    """Whether a sidecar's tensor has exponents."""
    return name.endswith((_COLUMNS, _ROWS))


def tensor_of(name: str) -> str:
    """The tensor that a sidecar's exponents belong to."""
    if name.endswith(_ROWS):
        return name.removesuffix(_ROWS)
    return f"{name.removesuffix(_COLUMNS)}{_WEIGHT}"


def gathered(found: Iterable[tuple[str, bytes]]) -> dict[str, TensorExponents]:
    """The exponents by tensor, from the tensors of sidecars that have exponents, with their bytes."""
    result: dict[str, TensorExponents] = {}
    for name, data in found:
        each = TensorExponents(rows=data) if name.endswith(_ROWS) else TensorExponents(columns=data)
        result[tensor_of(name)] = result.get(tensor_of(name), NOT_SCALED) | each
    return result


def are_sound(data: bytes) -> bool:
    """Whether these are exponents that a smoothing can have."""
    return all(-MAX_EXPONENT <= value <= MAX_EXPONENT for value in array("b", data))


def misfits(layers: Mapping[str, LayerSmoothing], exponents: Mapping[str, TensorExponents]) -> Iterator[str]:
    """The layers, by their weights, whose columns are not multiplied by what divides their input.

    Where a producer has a row for each column, they must be opposite one by one. Where it has other rows too, or shares
    one between columns, the exponents that occur must be the same.
    """
    made: dict[str, set[int]] = {}
    for weight, layer in layers.items():
        opposite = {-value for value in array("b", exponents.get(weight, NOT_SCALED).columns) if value}
        for tensor in layer.scaled:
            made.setdefault(tensor, set()).update(opposite)
    for weight, layer in layers.items():
        columns = array("b", exponents.get(weight, NOT_SCALED).columns)
        for tensor in layer.scaled:
            rows = array("b", exponents.get(tensor, NOT_SCALED).rows)
            one_by_one = len(rows) == len(columns)
            fits = list(rows) == [-value for value in columns] if one_by_one else set(rows) - {0} == made[tensor]
            if not fits:
                yield weight
                break


def _both(one: bytes, other: bytes) -> bytes:
    if not one or not other:
        return one or other
    return array("b", [a + b for a, b in zip(array("b", one), array("b", other), strict=True)]).tobytes()
