"""The exponents for one unit of a model: chosen from its inputs, and proved before they count.

Owns the order in which folds are tried, and which powers of two prove a fold. The folds and the proof are in
`model.folds`, the arithmetic in `llm_int8.smoothing`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from int8cli.llm_int8.columns import column_errors, column_savings
from int8cli.llm_int8.descent import descended
from int8cli.llm_int8.expected_error import ExpectedError
from int8cli.llm_int8.inputs import InputSummary
from int8cli.llm_int8.largest import row_chunks
from int8cli.llm_int8.limits import DEFAULT_OUTLIER_COLUMNS, EXACT_STEPS, Steps
from int8cli.llm_int8.matmul import InputScheme
from int8cli.llm_int8.scales import scaled
from int8cli.llm_int8.smoothing import (
    ALPHAS,
    ExponentRange,
    column_absmax,
    input_range,
    smoothed_output_error,
    smoothing_exponents,
)
from int8cli.model.folds import Fold, Proof, allowed_exponents, folds_of, scale
from int8cli.model.loaded_unit import LoadedUnit
from int8cli.model.sites import Site, weight_of
from int8cli.outliers.statistics import ScaledRows, SiteSmoothing

# Why a site is left alone.
NO_PRODUCER = "no fold was proved to be exact"
NO_GAIN = "no powers of two improve its int8 product"
NO_FINE_GAIN = "no scales improve its int8 product"
# On how many inputs the chosen exponents are compared with none, by the int8 products themselves.
_MEASURED = 128


@dataclass(frozen=True, slots=True)
class _Applied:
    """A fold that is in the weights of the unit now, with the powers of two `proving`."""

    fold: Fold
    exponents: Tensor
    alpha: float
    proving: Tensor


@dataclass(frozen=True, slots=True)
class UnitSmoothing:
    """What was found for the sites of a unit, by name: a proved smoothing, or why there is none."""

    found: Mapping[str, SiteSmoothing] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


class UnitSmoother:
    """Smooths units. What it finds in one does not depend on others, so that an interrupted run finds the same."""

    def __init__(
        self, scheme: InputScheme | None, alphas: Sequence[float] = ALPHAS, steps: Steps = EXACT_STEPS
    ) -> None:
        """The exponents are chosen for products with inputs quantized by `scheme`; None leaves them in floats.

        `steps` of an exponent are a factor of 2.
        """
        self._scheme, self._alphas, self._steps = scheme, tuple(alphas), steps

    def smoothing(
        self,
        loaded: LoadedUnit,
        sites: Sequence[Site],
        inputs: Mapping[str, InputSummary],
        examples: Mapping[str, Tensor],
    ) -> UnitSmoothing:
        """The proved smoothing of each site. The unit's weights are the same afterwards.

        The others are to be left alone: no fold was proved, or none made the int8 product better. `examples` are some
        inputs of each site (positions, in_features): the exponents are chosen for these. The unit must have been run
        with `repeatable`.
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
            found = {each.fold.site.name: self._result(loaded, each, examples) for each in applied}
            return UnitSmoothing(found, reasons)
        finally:
            for each in reversed(applied):
                scale(loaded, each.fold, -each.proving)

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
        absmax = summary.absmax.to(examples.device)
        choice = _Choice(self._scheme, self._alphas, self._steps, weights, absmax, examples)
        for fold in folds_of(loaded, site, earlier):
            if any(each.fold.overlaps(fold) for each in applied):
                continue
            found = choice.of(fold, allowed_exponents(loaded, fold, choice.steps))
            if found is None:
                return NO_GAIN if self._steps == EXACT_STEPS else NO_FINE_GAIN
            scale(loaded, fold, found.proving)
            applied.append(found)
            if proof.holds([each.fold.producer for each in applied]):
                return ""
            scale(loaded, fold, -applied.pop().proving)
        return NO_PRODUCER

    def _result(self, loaded: LoadedUnit, applied: _Applied, examples: Mapping[str, Tensor]) -> SiteSmoothing:
        fold = applied.fold
        module = loaded.module_of(fold.producer)
        size = weight_of(module).shape[0] if fold.producer in loaded.linears else len(fold.rows)
        rows = fold.row_exponents(applied.exponents, size).cpu()
        by_name = tuple(ScaledRows(f"{fold.producer}.{name}", rows) for name in fold.parameters)
        divided = scaled(examples[fold.site.name].float(), self._steps, columns=applied.exponents, undo=True)
        rowmax = float(divided.abs().amax(dim=1).double().square().mean())
        return SiteSmoothing(applied.exponents.cpu(), applied.alpha, by_name, rowmax, self._steps)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Chooses the exponents of a site. Folds that allow the same exponents get the same, found once.

    weights (out_features, in_features), absmax (in_features,) the largest |x| of each column.
    """

    scheme: InputScheme | None
    alphas: Sequence[float]
    steps: Steps
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
        return None if found is None else _Applied(fold, *found, proving=proving(found[0], self.steps))

    def _found(self, allowed: ExponentRange, group: Tensor | None) -> tuple[Tensor, float] | None:
        over, allowed = column_absmax(self.weights), allowed.in_steps(self.steps)
        choices = [smoothing_exponents(self.absmax, over, alpha, allowed, group, self.steps) for alpha in self.alphas]
        expected = ExpectedError(self.examples, self.weights, self.scheme, group, self.steps)
        alpha, first = min(zip(self.alphas, choices, strict=True), key=lambda choice: expected.of(choice[1]))
        exponents = descended(expected.with_stored(self._worth_storing(first)), first, allowed)
        gains = self._measured(exponents) < self._measured(torch.zeros_like(exponents))
        return (exponents, alpha) if gains else None

    def _worth_storing(self, exponents: Tensor) -> Tensor:
        """The columns that save most if they are stored, over all linears of the site: int64 (n,).

        As many as are stored by default, so that the exponents do not depend on how many are.
        """
        divided = scaled(self.examples, self.steps, columns=exponents, undo=True)
        mean_square = divided.float().square().mean(dim=0)
        savings = torch.zeros(len(mean_square), dtype=torch.float64, device=mean_square.device)
        for weight in self.weights:
            found = column_savings(mean_square, self._errors_once_smoothed(weight, exponents), smoothed=True)
            savings += found / found.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return savings.topk(min(DEFAULT_OUTLIER_COLUMNS, len(savings))).indices

    def _errors_once_smoothed(self, weight: Tensor, exponents: Tensor) -> Tensor:
        """||dW_:j||² of the smoothed weight: float64 (in_features,). No copy of all of it is made."""
        errors = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        for rows in row_chunks(weight):
            errors += column_errors(scaled(weight[rows], self.steps, columns=exponents))[0]
        return errors

    def _measured(self, exponents: Tensor) -> float:
        """The error of the int8 products on some of the examples, added up over the linears of the site."""
        some = self.examples[:: max(1, len(self.examples) // _MEASURED)]
        return sum(smoothed_output_error(some, weight, exponents, self.scheme, self.steps) for weight in self.weights)


def proving(exponents: Tensor, steps: Steps) -> Tensor:
    """The exponents of whole powers of two that prove a fold: int8 (in_features,).

    They are the nearest ones, but no column that is scaled at all is left out: where a scale is near to 1, it is proved
    by 2 or by one half. Columns with the same exponent have the same here.
    """
    if steps == EXACT_STEPS:
        return exponents
    nearest = (exponents.float() / steps).round()
    return torch.where(nearest == 0, exponents.sign(), nearest).to(torch.int8)
