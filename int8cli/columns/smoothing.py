"""Which tensors of a checkpoint a calibration's smoothing changes, and by which scales.

Owns the rules by which a proved smoothing is used in a conversion: all linears of the site become int8, and every
tensor has the shape that it had in the calibration. Other sites are left alone, with the reason.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from int8cli.errors import StatisticsFileError
from int8cli.llm_int8.scales import scales
from int8cli.outliers.statistics import OutlierStatistics, SiteSmoothing, SiteStatistics
from int8cli.planning.decisions import Decision
from int8cli.planning.exponents import NOT_SCALED, ShardSmoothing, TensorExponents, are_sound, misfits
from int8cli.results.smoothing import LayerSmoothing

NEVER_RUN = "the calibration did not reach it"
NOT_TRIED = "not tried: outside of the blocks, or in one that runs more than once"
_ANOTHER_SHAPE = "another shape than in the calibration"


@dataclass(slots=True)
class Smoothings:
    """The smoothing of a checkpoint, as far as its sites are known. `learn` adds sites.

    `decisions` are those of all tensors. `exponents` are those of the changed tensors, `layers` what to report on each
    linear, by its weight.
    """

    decisions: Mapping[str, Decision]
    exponents: dict[str, TensorExponents] = field(default_factory=dict)
    layers: dict[str, LayerSmoothing] = field(default_factory=dict)

    def learn(self, site: SiteStatistics) -> SiteStatistics:
        """Add a site. Returns the site as it will be: once smoothed, or as it is."""
        reason, smoothing = site.not_smoothed, site.smoothing
        if smoothing is not None:
            reason = next(self._obstacles(site, smoothing), "")
        if smoothing is None or reason:
            self.layers |= {_weight(linear.name): LayerSmoothing(reason=reason or NOT_TRIED) for linear in site.linears}
            return site
        steps = smoothing.steps
        scaled = {each.tensor: TensorExponents(_bytes(each.exponents), steps=steps) for each in smoothing.scaled}
        columns = TensorExponents(columns=_bytes(smoothing.exponents), steps=steps)
        for name, found in [*scaled.items(), *((_weight(linear.name), columns) for linear in site.linears)]:
            self.exponents[name] = self.exponents.get(name, NOT_SCALED) | found
        lowest, highest = smoothing.exponents.aminmax()
        smallest, largest = scales(torch.stack([lowest, highest]), steps).tolist()
        report = LayerSmoothing(tuple(sorted(scaled)), smoothing.alpha, smallest, largest, steps=steps)
        self.layers |= {_weight(linear.name): report for linear in site.linears}
        return site.once_smoothed()

    def of(self, tensors: Iterator[str]) -> ShardSmoothing:
        """The part of some tensors: those of a shard."""
        names = list(tensors)
        layers = {
            name: self.layers.get(name, LayerSmoothing(reason=NEVER_RUN))
            for name in names
            if self.decisions[name].quantize
        }
        return ShardSmoothing({name: self.exponents[name] for name in names if name in self.exponents}, layers)

    def contradictions(self) -> Iterator[str]:
        """Why the sites of the whole model do not fit together, with the name of a tensor for each reason."""
        for name, each in self.exponents.items():
            if not (are_sound(each.rows, each.steps) and are_sound(each.columns, each.steps)):
                yield f"{name} is scaled more than once, and by too much"
            if any(each.columns) and not self.layers[name].smoothed:
                yield f"{name} is multiplied by scales, and nothing divides its input"
        smoothed = {weight: layer for weight, layer in self.layers.items() if layer.smoothed}
        for weight in misfits(smoothed, self.exponents):
            yield f"{weight} is multiplied by other scales than its input is divided by"

    def _obstacles(self, site: SiteStatistics, smoothing: SiteSmoothing) -> Iterator[str]:
        """Why a proved smoothing cannot be used here."""
        for linear in site.linears:
            decision = self.decisions.get(_weight(linear.name))
            if decision is None or not decision.quantize:
                yield f"{linear.name} is not in int8"
            elif decision.computed_shape != (linear.out_features, linear.in_features):
                yield f"{linear.name}: {_ANOTHER_SHAPE}"
        for each in smoothing.scaled:
            decision = self.decisions.get(each.tensor)
            shape = None if decision is None else decision.spec.shape
            if decision is not None and decision.quantize:
                shape = decision.computed_shape[:1]
            elif shape is not None and len(shape) > 1:
                yield f"{each.tensor} is not in int8"
            if shape != (len(each.exponents),):
                yield f"{each.tensor}: {_ANOTHER_SHAPE}"


def require_consistent(statistics: OutlierStatistics, file: str, decisions: Mapping[str, Decision]) -> None:
    """Raise StatisticsFileError if the smoothing of a model's sites, which are from this file, does not fit together.

    `decisions` are those of all tensors of the checkpoint.
    """
    smoothings = Smoothings(decisions)
    for site in statistics.sites:
        smoothings.learn(site)
    reason = next(smoothings.contradictions(), None)
    if reason is not None:
        raise StatisticsFileError(f"{file} contradicts itself: {reason}", hint="Make the statistics again.")


def _weight(linear: str) -> str:
    return f"{linear}.weight"


def _bytes(exponents: Tensor) -> bytes:
    return bytes(exponents.contiguous().view(torch.uint8).tolist())
