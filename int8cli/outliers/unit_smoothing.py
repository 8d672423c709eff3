"""The exponents for one unit of a model: chosen from its inputs, and proved before they count.

Owns the order in which folds are tried. The folds and the proof are in `model.folds`, the arithmetic in
`llm_int8.smoothing`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from int8cli.llm_int8.inputs import InputSummary
from int8cli.llm_int8.matmul import InputScheme
from int8cli.llm_int8.smoothing import (
    ALPHAS,
    column_absmax,
    input_range,
    smoothed_output_error,
    smoothing_exponents,
)
from int8cli.model.folds import Fold, Proof, allowed_exponents, folds_of, scale
from int8cli.model.loaded_unit import LoadedUnit
from int8cli.model.sites import Site, weight_of
from int8cli.outliers.statistics import ScaledRows, SiteSmoothing

# The exponents are chosen for inputs without a zero point, which all loaders compute.
_SCHEME: InputScheme = "absmax"


@dataclass(frozen=True, slots=True)
class _Applied:
    """A fold that is in the weights of the unit now."""

    fold: Fold
    exponents: Tensor
    alpha: float


class UnitSmoother:
    """Smooths units. What it finds in one does not depend on others, so that an interrupted run finds the same."""

    def __init__(self, alphas: Sequence[float] = ALPHAS) -> None:
        self._alphas = tuple(alphas)

    @contextmanager
    def smoothed(
        self,
        loaded: LoadedUnit,
        sites: Sequence[Site],
        inputs: Mapping[str, InputSummary],
        examples: Mapping[str, Tensor],
    ) -> Iterator[dict[str, SiteSmoothing]]:
        """The proved smoothing of each site, by name, with the unit's weights smoothed while the context lasts.

        Sites that are not named are left alone: no fold was proved, or none made the int8 product better. `examples`
        are some inputs of each site (positions, in_features). The unit must have been run with `repeatable`.
        """
        applied: list[_Applied] = []
        try:
            proof = Proof(loaded)
            earlier: list[str] = []
            for site in sites:
                self._try(loaded, proof, site, list(earlier), applied, inputs[site.name], examples[site.name])
                earlier += site.linears
            yield {each.fold.site.name: _result(loaded, each) for each in applied}
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
    ) -> None:
        """Apply the first fold of a site that is proved, beside those that are `applied`."""
        for fold in folds_of(loaded, site, earlier):
            found = self._chosen(loaded, fold, summary, examples)
            if found is None:
                return
            scale(loaded, fold, found.exponents)
            applied.append(found)
            if proof.holds([each.fold.producer for each in applied]):
                return
            scale(loaded, fold, -applied.pop().exponents)

    def _chosen(self, loaded: LoadedUnit, fold: Fold, summary: InputSummary, examples: Tensor) -> _Applied | None:
        """The exponents with the least output error on the examples; None if leaving the site alone is as good."""
        weights = [weight_of(loaded.linears[name]) for name in fold.site.linears]
        absmax = summary.absmax.to(weights[0].device)
        allowed = allowed_exponents(loaded, fold) & input_range(absmax, examples.dtype)
        over = column_absmax(weights)
        best, least = None, _error(examples, weights, torch.zeros_like(fold.rows, dtype=torch.int8))
        for alpha in self._alphas:
            exponents = smoothing_exponents(absmax, over, alpha, allowed, fold.group)
            error = _error(examples, weights, exponents)
            if error < least:
                best, least = _Applied(fold, exponents, alpha), error
        return best


def _error(examples: Tensor, weights: Sequence[Tensor], exponents: Tensor) -> float:
    return sum(smoothed_output_error(examples, weight, exponents, _SCHEME) for weight in weights)


def _result(loaded: LoadedUnit, applied: _Applied) -> SiteSmoothing:
    fold = applied.fold
    module = loaded.module_of(fold.producer)
    size = weight_of(module).shape[0] if fold.producer in loaded.linears else len(fold.rows)
    rows = fold.row_exponents(applied.exponents, size).cpu()
    scaled = tuple(ScaledRows(f"{fold.producer}.{name}", rows) for name in fold.parameters)
    return SiteSmoothing(applied.exponents.cpu(), applied.alpha, scaled)
