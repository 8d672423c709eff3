"""The exponents for one unit of a model: chosen from its inputs, and proved before they count.

Owns the order in which folds are tried. The folds and the proof are in `model.folds`, the arithmetic in
`llm_int8.smoothing`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from int8cli.llm_int8.descent import ExpectedError
from int8cli.llm_int8.inputs import InputSummary
from int8cli.llm_int8.matmul import InputScheme
from int8cli.llm_int8.smoothing import (
    ALPHAS,
    ExponentRange,
    column_absmax,
    input_range,
    powers_of_two,
    smoothed_output_error,
    smoothing_exponents,
)
from int8cli.model.folds import Fold, Proof, allowed_exponents, folds_of, scale
from int8cli.model.loaded_unit import LoadedUnit
from int8cli.model.sites import Site, weight_of
from int8cli.outliers.statistics import ScaledRows, SiteSmoothing

# Why a site is left alone.
NO_PRODUCER = "nothing before it takes the division exactly"
NO_GAIN = "no powers of two make its int8 product better"
# On how many inputs the chosen exponents are compared with none, by the int8 products themselves.
_MEASURED = 128


@dataclass(frozen=True, slots=True)
class _Applied:
    """A fold that is in the weights of the unit now."""

    fold: Fold
    exponents: Tensor
    alpha: float


@dataclass(frozen=True, slots=True)
class UnitSmoothing:
    """What was found for the sites of a unit, by name: a proved smoothing, or why there is none."""

    found: Mapping[str, SiteSmoothing] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def rows_of(self, linear: str) -> Tensor | None:
        """The exponents of the rows of a linear that makes a divided input, int8 (out,); None if no row is scaled."""
        rows = [
            scaled.exponents
            for smoothing in self.found.values()
            for scaled in smoothing.scaled
            if scaled.tensor == f"{linear}.weight"
        ]
        return torch.stack(rows).sum(dim=0, dtype=torch.int8) if rows else None


class UnitSmoother:
    """Smooths units. What it finds in one does not depend on others, so that an interrupted run finds the same."""

    def __init__(self, scheme: InputScheme | None, alphas: Sequence[float] = ALPHAS) -> None:
        """The exponents are chosen for products with inputs quantized by `scheme`; None leaves them in floats."""
        self._scheme, self._alphas = scheme, tuple(alphas)

    @contextmanager
    def smoothed(
        self,
        loaded: LoadedUnit,
        sites: Sequence[Site],
        inputs: Mapping[str, InputSummary],
        examples: Mapping[str, Tensor],
    ) -> Iterator[UnitSmoothing]:
        """The proved smoothing of each site, with the unit's weights smoothed while the context lasts.

        The others are left alone: no fold was proved, or none made the int8 product better. `examples` are some inputs
        of each site (positions, in_features): the exponents are chosen for these. The unit must have been run with
        `repeatable`.
        """
        applied: list[_Applied] = []
        reasons: dict[str, str] = {}
        try:
            proof = Proof(loaded)
            earlier: list[str] = []
            for site in sites:
                given = inputs[site.name], examples[site.name]
                reason = self._try(loaded, proof, site, list(earlier), applied, *given)
                if reason:
                    reasons[site.name] = reason
                earlier += site.linears
            found = {each.fold.site.name: _result(loaded, each, examples[each.fold.site.name]) for each in applied}
            yield UnitSmoothing(found, reasons)
        finally:
            for each in reversed(applied):
                scale(loaded, each.fold, -each.exponents)

    def _try(
        self,
        loaded: LoadedUnit,
        proof: Proof,
        site: Site,
        earlier: Sequence[str],
        applied: list[_Applied],
        summary: InputSummary,
        examples: Tensor,
    ) -> str:
        """Apply the first fold of a site that is proved, beside those that are `applied`. Returns why none was."""
        weights = [weight_of(loaded.linears[name]) for name in site.linears]
        choice = _Choice(self._scheme, self._alphas, weights, summary.absmax.to(examples.device), examples)
        for fold in folds_of(loaded, site, earlier):
            if any(each.fold.overlaps(fold) for each in applied):
                continue
            found = choice.of(fold, allowed_exponents(loaded, fold))
            if found is None:
                return NO_GAIN
            scale(loaded, fold, found.exponents)
            applied.append(found)
            if proof.holds([each.fold.producer for each in applied]):
                return ""
            scale(loaded, fold, -applied.pop().exponents)
        return NO_PRODUCER


@dataclass(frozen=True, slots=True)
class _Choice:
    """Chooses the exponents of a site. Folds that allow the same exponents get the same, found once.

    weights (out_features, in_features), absmax (in_features,) the largest |x| of each column.
    """

    scheme: InputScheme | None
    alphas: Sequence[float]
    weights: Sequence[Tensor]
    absmax: Tensor
    examples: Tensor
    _known: dict[tuple[tuple[int, ...], ...], tuple[Tensor, float] | None] = field(default_factory=dict)

    def of(self, fold: Fold, allowed: ExponentRange) -> _Applied | None:
        """The exponents found for the examples; None if leaving the site alone is as good."""
        allowed, group = allowed & input_range(self.absmax, self.examples.dtype), fold.group
        key = tuple(tuple(each.tolist()) for each in (allowed.lowest, allowed.highest, group) if each is not None)
        if key not in self._known:
            self._known[key] = self._found(allowed, group)
        found = self._known[key]
        return None if found is None else _Applied(fold, *found)

    def _found(self, allowed: ExponentRange, group: Tensor | None) -> tuple[Tensor, float] | None:
        over = column_absmax(self.weights)
        choices = [smoothing_exponents(self.absmax, over, alpha, allowed, group) for alpha in self.alphas]
        expected = ExpectedError(self.examples, self.weights, self.scheme, group)
        alpha, first = min(zip(self.alphas, choices, strict=True), key=lambda choice: expected.of(choice[1]))
        exponents = expected.descended(first, allowed)
        gains = self._measured(exponents) < self._measured(torch.zeros_like(exponents))
        return (exponents, alpha) if gains else None

    def _measured(self, exponents: Tensor) -> float:
        """The error of the int8 products on some of the examples, added up over the linears of the site."""
        some = self.examples[:: max(1, len(self.examples) // _MEASURED)]
        return sum(smoothed_output_error(some, weight, exponents, self.scheme) for weight in self.weights)


def _result(loaded: LoadedUnit, applied: _Applied, examples: Tensor) -> SiteSmoothing:
    fold = applied.fold
    module = loaded.module_of(fold.producer)
    size = weight_of(module).shape[0] if fold.producer in loaded.linears else len(fold.rows)
    rows = fold.row_exponents(applied.exponents, size).cpu()
    scaled = tuple(ScaledRows(f"{fold.producer}.{name}", rows) for name in fold.parameters)
    divided = examples.float() * powers_of_two(-applied.exponents, torch.float32)
    rowmax = float(divided.abs().amax(dim=1).double().square().mean())
    return SiteSmoothing(applied.exponents.cpu(), applied.alpha, scaled, rowmax)
