"""Where the input of a linear can be divided: in the gain of a norm, or in the rows of an earlier linear of the unit.

Owns the ways to divide a site's input, and the proof that one of them leaves the function as it is. A way is only a
guess until a run proves it: the unit runs on a real sequence with and without the fold, and the outputs of all linears
and of the unit must be equal bit for bit. Knows nothing of int8, nor how the exponents are chosen.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from int8cli.llm_int8.limits import EXACT_STEPS, Steps
from int8cli.llm_int8.scales import powers_of_two
from int8cli.llm_int8.smoothing import ExponentRange, exact_range, normal_range
from int8cli.model.loaded_unit import LoadedUnit
from int8cli.model.sites import Site, linears_of, product_of, tensors_in, weight_of

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size")


@dataclass(frozen=True, slots=True)
class Fold:
    """A way to divide the input columns of a site: row `rows[j]` of the producer makes column j.

    `producer` is the name of a norm or linear in the checkpoint, `parameters` are those of its parameters that are
    scaled. `rows` is int64 (in_features,). `arrangement` says in a word how the rows are found in the producer.
    """

    site: Site
    producer: str
    parameters: tuple[str, ...]
    rows: Tensor
    arrangement: str

    @property
    def group(self) -> Tensor | None:
        """The columns that share a row, as `smoothing_exponents` wants them; None if no two do."""
        return self.rows if len(set(self.rows.tolist())) < len(self.rows) else None

    def overlaps(self, other: "Fold") -> bool:
        """Whether both scale a row of one producer."""
        return self.producer == other.producer and not set(self.rows.tolist()).isdisjoint(other.rows.tolist())

    def row_exponents(self, exponents: Tensor, size: int) -> Tensor:
        """The exponents of the producer's rows, int8 (size,), from those of the input columns."""
        found = torch.zeros(size, dtype=torch.int8, device=exponents.device)
        found[self.rows] = -exponents
        return found


def folds_of(loaded: LoadedUnit, site: Site, earlier: Sequence[str]) -> Iterator[Fold]:
    """The ways that are worth a proof, the likeliest first. `earlier` are the linears called before the site.

    Only parameters that are tensors of the checkpoint are scaled, one to one, and none that is used elsewhere too. In a
    unit that limits values, only norms can divide: a limit that the run does not reach would not be seen.
    """
    if not all(loaded.owns(f"{name}.weight") for name in site.linears):
        return
    if site.norm is not None:
        rows = torch.arange(site.in_features)
        yield from _sound(loaded, site, site.norm, rows, "norm")
        return
    if loaded.limits:
        return
    heads = _head_sizes(loaded.module) if site.kind == "attention output" else ()
    for name in reversed(earlier):
        out_features = weight_of(loaded.linears[name]).shape[0]
        for arrangement, rows in _arrangements(site.in_features, out_features, heads):
            yield from _sound(loaded, site, name, rows, arrangement)


def _sound(loaded: LoadedUnit, site: Site, producer: str, rows: Tensor, arrangement: str) -> Iterator[Fold]:
    """The fold, if every parameter of the producer has one row (or element) for each of `rows`."""
    module = loaded.module_of(producer)
    parameters = dict(module.named_parameters(recurse=False))
    known = all(loaded.owns(f"{producer}.{name}") for name in parameters)
    if not parameters or not known or set(parameters) - {"weight", "bias"} or any(True for _ in module.children()):
        return
    is_linear = bool(linears_of(module))
    size = weight_of(module).shape[0] if is_linear else site.in_features
    if not loaded.ran_beside([producer, *site.linears]):
        return
    vectors = [tuple(each.shape) for name, each in parameters.items() if not (is_linear and name == "weight")]
    if all(shape == (size,) for shape in vectors) and int(rows.max()) < size:
        yield Fold(site, producer, tuple(parameters), rows.to(parameters["weight"].device), arrangement)


def _arrangements(in_features: int, out_features: int, heads: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """How input columns may be found among the rows of a linear: one of several parts, or the values of attention."""
    columns = torch.arange(in_features)
    if out_features % in_features == 0:
        parts = out_features // in_features
        for part in reversed(range(parts)):
            yield f"part {part + 1} of {parts}", columns + part * in_features
    for size in heads:
        if in_features % size == 0 and out_features % size == 0:
            yield from _value_arrangements(in_features // size, out_features // size, size)


def _value_arrangements(heads: int, rows: int, size: int) -> Iterator[tuple[str, Tensor]]:
    """Where the values of `heads` query heads are among `rows` heads of rows: alone, or fused with queries and keys."""
    head = torch.arange(heads)[:, None]
    within = torch.arange(size)[None]

    def at(place: Tensor) -> Tensor:
        return (place * size + within).reshape(-1)

    if rows < heads and heads % rows == 0:
        yield "shared values", at(head // (heads // rows))
    if rows == 3 * heads:
        yield "values by head", at(head * 3 + 2)
    values = (rows - heads) // 2
    if rows > heads and (rows - heads) % 2 == 0 and heads % values == 0:
        shared = heads // values
        yield "queries, keys, shared values", at(rows - values + head // shared)
        yield "values by group", at(head // shared * (shared + 2) + shared + 1)


def _head_sizes(module: nn.Module) -> tuple[int, ...]:
    """The sizes of an attention head that the modules of a unit name."""
    found = (getattr(child, name, None) for child in module.modules() for name in _HEAD_SIZES)
    return tuple(dict.fromkeys(size for size in found if isinstance(size, int) and size > 0))


def allowed_exponents(loaded: LoadedUnit, fold: Fold, steps: Steps) -> ExponentRange:
    """The exponents of the input columns for which every scaled parameter stays exact in its dtype.

    In finer steps, the vectors that stay floats must stay normal too.
    """
    device = fold.rows.device
    allowed = ExponentRange.unlimited(len(fold.rows), device)
    for linear in fold.site.linears:
        allowed = allowed & exact_range(weight_of(loaded.linears[linear]))
    for name, parameter in zip(fold.parameters, _producing(loaded, fold), strict=True):
        of_rows = exact_range(parameter.reshape(parameter.shape[0], -1).t())
        if parameter.dim() == 1 and loaded.is_float16(f"{fold.producer}.{name}"):
            of_rows = of_rows & _float16_range(parameter)
        if parameter.dim() == 1 and steps != EXACT_STEPS:
            of_rows = of_rows & normal_range(parameter)
        allowed = allowed & -ExponentRange(of_rows.lowest[fold.rows], of_rows.highest[fold.rows])
    return allowed


def _float16_range(vector: Tensor) -> ExponentRange:
    """The exponents for which a vector that the checkpoint has in float16 stays exact there, with one to spare.

    The model may have it in another dtype, rounded: then its last digit is not known, but where it is normal is.
    """
    if vector.dtype == torch.float16:
        return ExponentRange.unlimited(len(vector), vector.device)
    stored = vector.half()
    normal, whole = normal_range(stored), exact_range(stored[None])
    return ExponentRange((normal.lowest + 1).clamp(max=0), torch.minimum(normal.highest, whole.highest))


def scale(loaded: LoadedUnit, fold: Fold, exponents: Tensor) -> None:
    """Divide the input of a site by 2^exponents in its producer and multiply the columns of its linears, in place.

    The negative exponents undo it, bit for bit, if the exponents were allowed.
    """
    for name in fold.site.linears:
        weight = weight_of(loaded.linears[name])
        weight.mul_(powers_of_two(exponents, weight.dtype))
    for parameter in _producing(loaded, fold):
        factors = powers_of_two(fold.row_exponents(exponents, parameter.shape[0]), parameter.dtype)
        parameter.mul_(factors.reshape(-1, *[1] * (parameter.dim() - 1)))


def _producing(loaded: LoadedUnit, fold: Fold) -> list[Tensor]:
    """The parameters of the producer, the weight of a linear as (out, in)."""
    module = loaded.module_of(fold.producer)
    is_linear = bool(linears_of(module))
    return [weight_of(module) if is_linear and name == "weight" else getattr(module, name) for name in fold.parameters]


class Proof:
    """The outputs of a unit and its linears for one sequence, to be compared after a change of its weights."""

    def __init__(self, loaded: LoadedUnit) -> None:
        """Runs the unit. Its weights must be those of the checkpoint."""
        self._loaded = loaded
        self._outputs: dict[str, list[Tensor]] = {}
        self._run(lambda name, place, output: self._outputs.setdefault(name, []).append(output.clone()))

    def holds(self, producers: Sequence[str]) -> bool:
        """Run the unit again: whether all outputs are the same bits, but those of linears that are `producers`."""
        differing: set[str] = set()

        def compare(name: str, place: int, output: Tensor) -> None:
            before = self._outputs.get(name, [])
            if place >= len(before) or not same_bits(output, before[place]):
                differing.add(name)

        counts = self._run(compare)
        complete = counts == {name: len(outputs) for name, outputs in self._outputs.items()}
        return complete and not differing - set(producers)

    def _run(self, take: Any) -> dict[str, int]:
        """Run the unit and pass each output to `take` with its name and number. Returns how many there were of each."""
        counts: dict[str, int] = {}

        def took(name: str, output: Tensor) -> None:
            place = counts.get(name, 0)
            counts[name] = place + 1
            take(name, place, output)

        with ExitStack() as hooks, torch.no_grad():
            for name, linear in self._loaded.linears.items():
                hook = linear.register_forward_hook(partial(_hooked, took, name))
                hooks.callback(hook.remove)
            for output in tensors_in(self._loaded.again()):
                took("", output)
        return counts


def _hooked(took: Any, name: str, linear: nn.Module, inputs: Sequence[Tensor], output: object) -> None:
    took(name, product_of(linear, inputs, output))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, in NaN and the sign of 0 too."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = _BITS.get(one.dtype.itemsize) if one.is_floating_point() else None
    return torch.equal(one.view(bits), other.view(bits)) if bits is not None else torch.equal(one, other)
