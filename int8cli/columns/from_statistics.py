"""Columns by the statistics of a calibration: the choice, its reasons, and the output error it is expected to leave.

Owns what is made of statistics that are there, and whether they are of this model.
"""

from collections.abc import Callable, Mapping

import torch

from int8cli.checkpoint.source import LocalFile, Source
from int8cli.columns import FROM_ACTIVATIONS, TakeShard
from int8cli.errors import StatisticsMismatchError
from int8cli.llm_int8.outliers import choose_columns, predicted_output_error
from int8cli.outlier_statistics import LinearStatistics, OutlierStatistics, SiteStatistics
from int8cli.output import sidecar_specs
from int8cli.plan import Decision
from int8cli.results import RelativeOutputError, StoredColumn, StoredColumns
from int8cli.survey import Survey, model_fingerprint


class StatisticsColumns:
    """Columns by the sites of a calibration, as many of each linear as `limit`. `learn` adds sites."""

    def __init__(self, survey: Survey, limit: int) -> None:
        self._layouts = {layout.file_name: layout for layout in survey.layouts}
        self._decisions = survey.decisions
        self._limit = limit
        self._linears: dict[str, tuple[SiteStatistics, LinearStatistics]] = {}

    def learn(self, sites: tuple[SiteStatistics, ...]) -> None:
        self._linears.update({linear.name: (site, linear) for site in sites for linear in site.linears})

    def bring(self, take: TakeShard, require_room: Callable[[int], None]) -> None:
        pass

    def columns_of(self, shard: str, local: LocalFile) -> Mapping[str, StoredColumns]:
        """Of a linear that the calibration never came to, nothing is stored."""
        decisions = (self._decisions[stored.spec.name] for stored in self._layouts[shard].tensors)
        known = [each for each in decisions if each.quantize and each.module in self._linears]
        return {each.spec.name: stored_columns(*self._linears[each.module], each, self._limit) for each in known}


def require_same_model(statistics: OutlierStatistics, source: Source, survey: Survey) -> None:
    """Raise StatisticsMismatchError unless the statistics are of this very model."""
    was = statistics.provenance
    identity = source.identity
    of = f"{was.model}{f' at {was.revision}' if was.revision else ''}"
    hint = "Make them of this model: int8cli inspect-outliers MODEL --output FILE.safetensors"
    if identity.on_hub and (was.model, was.revision) != (identity.name, identity.revision):
        wanted = f"{identity.name} at {identity.revision}"
        raise StatisticsMismatchError(f"the statistics are of {of}, and this is {wanted}", hint=hint)
    if not identity.on_hub and was.model_fingerprint != model_fingerprint(source, survey.layouts):
        raise StatisticsMismatchError(f"the statistics are of {of}, whose shards are not those here", hint=hint)
    shapes = {decision.module: sorted(decision.spec.shape) for decision in survey.plan.quantized}
    for site in statistics.sites:
        for linear in site.linears:
            if shapes.get(linear.name, shape := sorted((linear.out_features, linear.in_features))) != shape:
                raise StatisticsMismatchError(f"the statistics have another shape for {linear.name}", hint=hint)


def stored_columns(site: SiteStatistics, linear: LinearStatistics, decision: Decision, limit: int) -> StoredColumns:
    """The columns of one linear that are worth storing, and the output error that is predicted with them."""
    indices = choose_columns(site.inputs, linear.weight_error, limit)
    share = site.inputs.mean_square.double() * linear.weight_error.double()  # (in,)
    share /= share.sum().clamp_min(1e-300)
    absmax = site.inputs.absmax
    columns = tuple(StoredColumn(index, float(absmax[index]), float(share[index])) for index in indices)
    measured = None
    if linear.stored == indices and linear.measured_error is not None and linear.measured_error_stored is not None:
        measured = RelativeOutputError(linear.measured_error, linear.measured_error_stored)
    predicted = _predicted(site, linear, indices)
    return StoredColumns(FROM_ACTIVATIONS, columns, sidecar_bytes(decision, len(indices)), predicted, measured)


def sidecar_bytes(decision: Decision, count: int) -> int:
    """What both of a linear's sidecar tensors take."""
    return sum(spec.nbytes for spec in sidecar_specs(decision, count))


def _predicted(site: SiteStatistics, linear: LinearStatistics, indices: tuple[int, ...]) -> RelativeOutputError:
    left = site.inputs.absmax.clone()
    left[torch.tensor(indices, dtype=torch.long)] = 0.0
    largest_left = float(left.max()) if left.numel() else 0.0
    with_stored = predicted_output_error(
        site.inputs.mean_square,
        linear.weight_error,
        linear.output_mean_square,
        mean_squared_rowmax=min(site.inputs.mean_squared_rowmax, largest_left**2),
        weight_sum_squares=linear.weight_sum_squares,
        kept=indices,
    )
    return RelativeOutputError(site.predicted_error(linear, int8_inputs=True), with_stored)
