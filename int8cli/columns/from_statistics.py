"""Columns from the statistics of a calibration: the choice, its reasons, and the predicted output error.

Owns how existing statistics are used, and the check that they belong to this model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from int8cli.checkpoint.source import LocalFile, Source
from int8cli.columns.foreseen import statistics_settings
from int8cli.columns.smoothing import Smoothings, require_consistent
from int8cli.columns.wanted import ColumnStrategy, ColumnsWanted, at_most
from int8cli.conversion.column_source import ColumnSource, KnownColumns, Ready, RunTask
from int8cli.errors import StatisticsChangedError, StatisticsMismatchError
from int8cli.llm_int8.columns import choose_columns, column_savings, predicted_output_error, shared_out
from int8cli.outliers.statistics import LinearStatistics, OutlierStatistics, SiteStatistics
from int8cli.outliers.statistics_file import load_statistics
from int8cli.planning.decisions import Decision
from int8cli.planning.exponents import NOT_SCALED, NOT_SMOOTHED, ShardSmoothing, TensorExponents
from int8cli.planning.output_files import sidecar_bytes
from int8cli.planning.survey import Survey, model_fingerprint
from int8cli.records.conversion import FROM_ACTIVATIONS, STEPS, Settings, budget_bytes
from int8cli.results.stored_columns import RelativeOutputError, StoredColumn, StoredColumns


def strategy_from_statistics(
    wanted: ColumnsWanted, source: Source, survey: Survey, settings: Settings
) -> ColumnStrategy:
    """Choose by the statistics file that the user named.

    Raises StatisticsMismatchError, StatisticsChangedError, CheckpointError: StatisticsFileError if the file contradicts
    itself, before a shard is converted by it.

    The settings have the file's digest: a run that resumes must not go on with the columns of another file.
    """
    path = Path(wanted.mode)
    chosen = statistics_settings(wanted, settings)
    statistics = load_statistics(path)
    if statistics_settings(wanted, settings) != chosen:
        raise StatisticsChangedError(f"{path} changed while it was read", hint="Run the same command again.")
    require_same_model(statistics, source, survey)
    if wanted.smooth:
        require_consistent(statistics, path.name, survey.decisions)
    columns = StatisticsColumns(survey, wanted)
    columns.learn(statistics.sites)
    if wanted.budget:
        counts = {f"{name}.weight": len(indices) for name, indices in columns.shared.items()}
    else:
        known = {linear.name for site in statistics.sites for linear in site.linears}
        counts = {each.spec.name: at_most(each, wanted.limit) for each in survey.plan.quantized if each.module in known}
    return ColumnStrategy(
        replace(survey, stored_counts=counts, smooth=STEPS.get(chosen.smooth)), chosen, Ready(columns)
    )


class StatisticsColumns(ColumnSource):
    """The columns of each linear that are worth storing, from the sites of a calibration. `learn` adds sites.

    They are at most so many of each linear or, with a budget, shared out among all of them: then the calibration must
    have come to its end. If smoothing is wanted, a site is smoothed where the calibration proved that it can be, and
    its columns are chosen after it.
    """

    def __init__(self, survey: Survey, wanted: ColumnsWanted) -> None:
        self._shards = {contents.file_name: contents for contents in survey.shards}
        self._decisions = survey.decisions
        self._limit, self._budget = wanted.limit, budget_bytes(wanted.budget, survey.output_bytes)
        self._shares = wanted.budget > 0.0
        self._shared: dict[str, tuple[int, ...]] | None = None
        self._linears: dict[str, tuple[SiteStatistics, LinearStatistics]] = {}
        self._smoothings = Smoothings(survey.decisions) if wanted.smooth else None
        self._settled: dict[str, TensorExponents] = {}

    def learn(self, sites: tuple[SiteStatistics, ...], tensors: Iterable[str] = ()) -> None:
        """Add the sites of a unit, which has these tensors of the checkpoint."""
        if self._smoothings is not None:
            sites = tuple(map(self._smoothings.learn, sites))
            self._settled |= {name: self._smoothings.exponents.get(name, NOT_SCALED) for name in tensors}
        self._linears.update({linear.name: (site, linear) for site in sites for linear in site.linears})

    def columns_of(self, shard: str, local: LocalFile, run: RunTask) -> Mapping[str, StoredColumns]:
        return self.known(shard).stored

    def _indices(self, module: str) -> tuple[int, ...]:
        if self._shares:
            return self.shared[module]
        site, linear = self._linears[module]
        return choose_columns(site.inputs, linear.weight_error, self._limit)

    @property
    def shared(self) -> Mapping[str, tuple[int, ...]]:
        """The columns of every linear within the budget, by its name. The first call decides."""
        if self._shared is None:
            quantized = {each.module: each for each in self._decisions.values() if each.quantize}
            names = sorted(self._linears.keys() & quantized.keys())
            savings = [_relative_savings(*self._linears[name]) for name in names]
            costs = [sidecar_bytes(quantized[name], 1) for name in names]
            self._shared = dict(zip(names, shared_out(savings, costs, self._budget), strict=True))
        return self._shared

    def smoothing_of(self, shard: str) -> ShardSmoothing:
        if self._smoothings is None:
            return NOT_SMOOTHED
        return self._smoothings.of(stored.spec.name for stored in self._shards[shard].tensors)

    def known(self, shard: str) -> KnownColumns:
        """By the sites so far. A linear that the calibration never reached gets no columns."""
        decisions = (self._decisions[stored.spec.name] for stored in self._shards[shard].tensors)
        known = [each for each in decisions if each.quantize and each.module in self._linears]
        stored = {
            each.spec.name: stored_columns(*self._linears[each.module], each, self._indices(each.module))
            for each in known
        }
        return KnownColumns(stored, self.smoothing_of(shard))

    def settled(self) -> Mapping[str, TensorExponents]:
        return self._settled


def require_same_model(statistics: OutlierStatistics, source: Source, survey: Survey) -> None:
    """Raise StatisticsMismatchError unless the statistics were made from this model."""
    was = statistics.provenance
    identity = source.identity
    made_from = f"{was.model}{f' at {was.revision}' if was.revision else ''}"
    hint = "Make statistics from this model."
    if identity.on_hub and (was.model, was.revision) != (identity.name, identity.revision):
        wanted = f"{identity.name} at {identity.revision}"
        raise StatisticsMismatchError(f"the statistics were made from {made_from}, not from {wanted}", hint=hint)
    if not identity.on_hub and was.model_fingerprint != model_fingerprint(source, survey.shards):
        raise StatisticsMismatchError(f"the statistics were made from {made_from}, not from this model", hint=hint)
    shapes = {decision.module: sorted(decision.spec.shape) for decision in survey.plan.quantized}
    for site in statistics.sites:
        for linear in site.linears:
            if shapes.get(linear.name, shape := sorted((linear.out_features, linear.in_features))) != shape:
                raise StatisticsMismatchError(f"the statistics have a different shape for {linear.name}", hint=hint)


def _relative_savings(site: SiteStatistics, linear: LinearStatistics) -> Tensor:
    """What storing each column takes off the squared relative error of the linear's output: float64 (in,)."""
    savings = column_savings(site.inputs.mean_square, linear.weight_error, smoothed=site.inputs.smoothed)
    return savings / linear.output_mean_square if linear.output_mean_square > 0.0 else torch.zeros_like(savings)


def stored_columns(
    site: SiteStatistics, linear: LinearStatistics, decision: Decision, indices: tuple[int, ...]
) -> StoredColumns:
    """The columns of one linear with the reason for each, and the output error predicted with them stored."""
    share = site.inputs.mean_square.double() * linear.weight_error.double()  # (in,)
    share /= share.sum().clamp_min(1e-300)
    absmax = site.inputs.absmax
    columns = tuple(StoredColumn(index, float(absmax[index]), float(share[index])) for index in indices)
    measured = None
    if linear.stored == indices and linear.measured_error is not None and linear.measured_error_stored is not None:
        measured = RelativeOutputError(linear.measured_error, linear.measured_error_stored)
    predicted = _predicted(site, linear, indices)
    return StoredColumns(FROM_ACTIVATIONS, columns, sidecar_bytes(decision, len(indices)), predicted, measured)


def _predicted(site: SiteStatistics, linear: LinearStatistics, indices: tuple[int, ...]) -> RelativeOutputError:
    others = site.inputs.absmax.clone()
    others[torch.tensor(indices, dtype=torch.long)] = 0.0
    largest_other = float(others.max()) if others.numel() else 0.0
    with_stored = predicted_output_error(
        site.inputs.mean_square,
        linear.weight_error,
        linear.output_mean_square,
        mean_squared_rowmax=min(site.inputs.mean_squared_rowmax, largest_other**2),
        weight_sum_squares=linear.weight_sum_squares,
        exact=indices,
    )
    return RelativeOutputError(site.predicted_error(linear, int8_inputs=True), with_stored)
