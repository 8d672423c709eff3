"""The exponents for one unit of a model: chosen from its inputs, and proved before they count.

Owns the order in which folds are tried. The folds and the proof are in `model.folds`, the arithmetic in
`llm_int8.smoothing`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from int8cli.llm_int8.inputs import InputSummary
from int8cli.llm_int8.matmul import InputScheme
from int8cli.llm_int8.smoothing import (
    ALPHAS,
    column_absmax,
    input_range,
    powers_of_two,
    smoothed_output_errors,
    smoothing_exponents,
)
from int8cli.model.folds import Fold, Proof, allowed_exponents, folds_of, scale
from int8cli.model.loaded_unit import LoadedUnit
from int8cli.model.sites import Site, weight_of
from int8cli.outliers.statistics import ScaledRows, SiteSmoothing

# Why a site is left alone.
NO_PRODUCER = "nothing before it takes the division exactly"
NO_GAIN = "no powers of two make its int8 product better"


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
        of each site (positions, in_features). The unit must have been run with `repeatable`.
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
        for fold in folds_of(loaded, site, earlier):
            if any(each.fold.overlaps(fold) for each in applied):
                continue
            found = self._chosen(loaded, fold, summary, examples)
            if found is None:
                return NO_GAIN
            scale(loaded, fold, found.exponents)
            applied.append(found)
            if proof.holds([each.fold.producer for each in applied]):
                return ""
            scale(loaded, fold, -applied.pop().exponents)
        return NO_PRODUCER

    def _chosen(self, loaded: LoadedUnit, fold: Fold, summary: InputSummary, examples: Tensor) -> _Applied | None:
        """The exponents with the least output error on the examples; None if leaving the site alone is as good."""
        weights = [weight_of(loaded.linears[name]) for name in fold.site.linears]
        absmax = summary.absmax.to(weights[0].device)
        allowed = allowed_exponents(loaded, fold) & input_range(absmax, examples.dtype)
        over = column_absmax(weights)
        choices = [smoothing_exponents(absmax, over, alpha, allowed, fold.group) for alpha in self._alphas]
        nothing = torch.zeros_like(fold.rows, dtype=torch.int8)
        unchanged, *errors = self._errors(examples, weights, [nothing, *choices])
        best = min(range(len(choices)), key=errors.__getitem__)
        if errors[best] >= unchanged:
            return None
        return _Applied(fold, choices[best], self._alphas[best])

    def _errors(self, examples: Tensor, weights: Sequence[Tensor], choices: Sequence[Tensor]) -> list[float]:
        """The error of each choice, added up over the linears of a site."""
        by_weight = [smoothed_output_errors(examples, weight, choices, self._scheme) for weight in weights]
        return [sum(errors) for errors in zip(*by_weight, strict=True)]


def _result(loaded: LoadedUnit, applied: _Applied, examples: Tensor) -> SiteSmoothing:
    fold = applied.fold
    module = loaded.module_of(fold.producer)
    size = weight_of(module).shape[0] if fold.producer in loaded.linears else len(fold.rows)
    rows = fold.row_exponents(applied.exponents, size).cpu()
    scaled = tuple(ScaledRows(f"{fold.producer}.{name}", rows) for name in fold.parameters)
    divided = examples.float() * powers_of_two(-applied.exponents, torch.float32)
    rowmax = float(divided.abs().amax(dim=1).double().square().mean())
    return SiteSmoothing(applied.exponents.cpu(), applied.alpha, scaled, rowmax)
