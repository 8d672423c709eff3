"""The exponents that scale the tensors of a checkpoint in smoothing, and where a sidecar stores them.

Owns the names and shapes of these tensors. A weight's input columns are multiplied by 2^`X.smooth_exponents`, and the
rows of a tensor T that makes a divided input by 2^`T.smooth_row_exponents`. Exponents in quarter steps are called
`X.smooth_quarter_exponents` and `T.smooth_row_quarter_exponents`; `llm_int8.scales` has what they stand for. Needs no
torch: exponents are the bytes of int8 values.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from int8cli.checkpoint.tensor import CAST_ON_LOAD, ShardContents, TensorSpec
from int8cli.llm_int8.limits import EXACT_STEPS, FINE_STEPS, MAX_EXPONENT, Steps
from int8cli.planning.decisions import Decision
from int8cli.results.smoothing import LayerSmoothing

_COLUMNS: Mapping[Steps, str] = {EXACT_STEPS: ".smooth_exponents", FINE_STEPS: ".smooth_quarter_exponents"}
_ROWS: Mapping[Steps, str] = {EXACT_STEPS: ".smooth_row_exponents", FINE_STEPS: ".smooth_row_quarter_exponents"}
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class TensorExponents:
    """The exponents of one tensor, int8 each: of its rows (out_features, or the elements of a vector), of its columns.

    Empty where nothing is scaled. Both are those of a weight as (out_features, in_features), however it is stored.
    `steps` of an exponent are a factor of 2.
    """

    rows: bytes = b""
    columns: bytes = b""
    steps: Steps = EXACT_STEPS

    def __or__(self, other: "TensorExponents") -> "TensorExponents":
        """Both together, where they scale different rows. Raises ValueError if their steps differ.

        Where they scale the same row, the sum may be one that is not sound.
        """
        if self == NOT_SCALED:
            return other
        if self.steps != other.steps:
            raise ValueError("exponents of one tensor are in different steps")
        return TensorExponents(_both(self.rows, other.rows), _both(self.columns, other.columns), self.steps)


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
        yield TensorSpec(columns_name(tensor, exponents.steps), "I8", (len(exponents.columns),)), exponents.columns
    if exponents.rows:
        yield TensorSpec(rows_name(tensor, exponents.steps), "I8", (len(exponents.rows),)), exponents.rows


def most_specs(contents: ShardContents, decisions: Mapping[str, Decision], steps: Steps) -> Iterator[TensorSpec]:
    """The tensors of a shard's sidecar if everything that can be scaled is: int8 weights, and vectors of floats."""
    for stored in contents.tensors:
        spec, decision = stored.spec, decisions[stored.spec.name]
        if decision.quantize:
            rows, columns = reversed(spec.shape) if decision.transpose else spec.shape
            whole = TensorExponents(bytes(rows), bytes(columns), steps)
        elif len(spec.shape) == 1 and spec.dtype in CAST_ON_LOAD:
            whole = TensorExponents(bytes(spec.numel), steps=steps)
        else:
            continue
        yield from (each for each, _ in exponent_specs(spec.name, whole))


def columns_name(weight: str, steps: Steps = EXACT_STEPS) -> str:
    return f"{weight.removesuffix(_WEIGHT)}{_COLUMNS[steps]}"


def rows_name(tensor: str, steps: Steps = EXACT_STEPS) -> str:
    return f"{tensor}{_ROWS[steps]}"


def is_exponents(name: str) -> bool:
    """Whether a sidecar's tensor has exponents."""
    return name.endswith((*_COLUMNS.values(), *_ROWS.values()))


def are_of_rows(name: str) -> bool:
    """Whether a sidecar's exponents are those of rows, by their name."""
    return name.endswith(tuple(_ROWS.values()))


def steps_of(name: str) -> Steps:
    """In what steps a sidecar's exponents are, by their name."""
    return next(steps for steps in _COLUMNS if name.endswith((_COLUMNS[steps], _ROWS[steps])))


def tensor_of(name: str) -> str:
    """The tensor that a sidecar's exponents belong to."""
    steps = steps_of(name)
    if are_of_rows(name):
        return name.removesuffix(_ROWS[steps])
    return f"{name.removesuffix(_COLUMNS[steps])}{_WEIGHT}"


def gathered(found: Iterable[tuple[str, bytes]]) -> dict[str, TensorExponents]:
    """The exponents by tensor, from the tensors of sidecars that have exponents, with their bytes.

    Raises ValueError if those of one tensor are in different steps.
    """
    result: dict[str, TensorExponents] = {}
    for name, data in found:
        steps = steps_of(name)
        each = TensorExponents(data, steps=steps) if are_of_rows(name) else TensorExponents(columns=data, steps=steps)
        result[tensor_of(name)] = result.get(tensor_of(name), NOT_SCALED) | each
    return result


def are_sound(data: bytes, steps: Steps) -> bool:
    """Whether these are exponents that a smoothing in such steps can have."""
    return all(abs(value) <= MAX_EXPONENT * steps for value in array("b", data))


def misfits(layers: Mapping[str, LayerSmoothing], exponents: Mapping[str, TensorExponents]) -> Iterator[str]:
    """The layers, by their weights, whose columns are not multiplied by what divides their input.

    Both must be in the same steps. Where a producer has a row for each column, they must be opposite one by one. Where
    it has other rows too, or shares one between columns, the exponents that occur must be the same.
    """
    made: dict[str, set[int]] = {}
    for weight, layer in layers.items():
        opposite = {-value for value in array("b", exponents.get(weight, NOT_SCALED).columns) if value}
        for tensor in layer.scaled:
            made.setdefault(tensor, set()).update(opposite)
    for weight, layer in layers.items():
        reads = exponents.get(weight, NOT_SCALED)
        columns = array("b", reads.columns)
        for tensor in layer.scaled:
            makes = exponents.get(tensor, NOT_SCALED)
            rows = array("b", makes.rows)
            one_by_one = len(rows) == len(columns)
            fits = list(rows) == [-value for value in columns] if one_by_one else set(rows) - {0} == made[tensor]
            if not (fits and makes.steps == reads.steps):
                yield weight
                break


def _both(one: bytes, other: bytes) -> bytes:
    if not one or not other:
        return one or other
    sums = (a + b for a, b in zip(array("b", one), array("b", other), strict=True))
    return array("b", [max(-128, min(each, 127)) for each in sums]).tobytes()  # the limits of int8 are not sound either
