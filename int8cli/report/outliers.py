"""Outlier statistics and suspects on the terminal: the summary first, then the details."""

import statistics as stats
from collections import Counter
from collections.abc import Iterable, Sequence

from rich.table import Table

from int8cli.llm_int8.limits import EXACT_STEPS
from int8cli.llm_int8.outliers import LAYER_SHARE, POSITION_SHARE
from int8cli.outliers.statistics import (
    LocatedActivation,
    LocatedFeature,
    OutlierStatistics,
    SiteStatistics,
)
from int8cli.outliers.suspects import (
    MEASURED_AVERAGE_PRECISION,
    MEASURED_ON,
    MEASURED_PRECISION_OF_ALL,
    WeightSuspects,
)
from int8cli.report.terminal import stdout_console, titled_table
from int8cli.report.text import escape, printable

MOST_ROWS = 12


def show_statistics(found: OutlierStatistics) -> None:
    """Print the summary, the outlier features, the massive activations, and the sites by kind and by error."""
    console = stdout_console()
    features, massive = found.features(), grouped_massive(found.massive())
    for place, line in enumerate(summary_lines(found, features, massive)):
        console.print(printable(line), soft_wrap=True, markup=False, style="bold" if place in (0, 2) else None)
    if any(site.smoothing is not None or site.not_smoothed for site in found.linear_sites):
        for line in smoothed_lines(found.linear_sites):
            console.print(printable(line), soft_wrap=True, markup=False)
    tables = [_features_table(features)] if features else []
    tables += [_massive_table(massive)] if massive else []
    for table in (*tables, _kinds_table(found.linear_sites), _sites_table(found.linear_sites)):
        console.print()
        console.print_table(table)


def smoothed_lines(sites: Sequence[SiteStatistics]) -> list[str]:
    """How many inputs can be smoothed, and why the others cannot; and the predicted errors after that."""
    smoothed = sum(site.smoothing is not None for site in sites)
    fine = any(site.smoothing is not None and site.smoothing.steps != EXACT_STEPS for site in sites)
    how = "in steps of 2^(1/4)" if fine else "exactly"
    reasons = Counter(site.not_smoothed for site in sites if site.not_smoothed)
    left = "; ".join(f"{count:,} ({reason})" for reason, count in sorted(reasons.items()))
    lines = [f"{smoothed:,} of {len(sites):,} inputs can be smoothed {how}" + (f"; not: {left}" if left else "")]
    if smoothed:
        lines.append(f"{_predicted([site.once_smoothed() for site in sites])}, once smoothed")
    return lines


def _predicted(sites: Sequence[SiteStatistics]) -> str:
    """The median of the predicted output errors of all linears."""
    weights, both = (
        [site.predicted_error(linear, int8_inputs=int8_inputs) for site in sites for linear in site.linears]
        for int8_inputs in (False, True)
    )
    return (
        f"predicted output error: {stats.median(weights):.4f} with int8 weights, {stats.median(both):.4f} "
        f"vector-wise (median of {len(weights)} linears)"
    )


def show_suspects(found: WeightSuspects) -> None:
    """Print the suspects, and how reliable they are."""
    console = stdout_console()
    console.print(f"[bold]{escape(found.model)}[/bold]: suspects, from the weights alone", soft_wrap=True)
    console.print(suspects_caveat(), soft_wrap=True)
    table = titled_table("Suspects, by predicted magnitude")
    for name in ("dimension", "score", "layers"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("which", overflow="fold")
    for suspect in found.suspects:
        table.add_row(
            str(suspect.dimension),
            f"{suspect.score:.3f}",
            f"{len(suspect.layers)} of {suspect.layer_count}",
            ranges(suspect.layers),
        )
    table.caption = "score: predicted magnitude after a norm, mean over the norms"
    console.print_table(table)


def suspects_caveat() -> str:
    return (
        f"This is a guess. On {MEASURED_ON} the one true feature was ranked first, but it was the only one of "
        f"{round(1 / MEASURED_PRECISION_OF_ALL)}\nsuspects that was true (precision {MEASURED_PRECISION_OF_ALL:.2f}; "
        f"average precision over norms {MEASURED_AVERAGE_PRECISION:.2f}).\nTo be certain, run the model."
    )


def summary_lines(
    found: OutlierStatistics, features: Sequence[LocatedFeature], massive: Sequence["MassiveGroup"]
) -> list[str]:
    """The lines of the summary: the model and the text, then the result."""
    of = found.provenance
    named = ", ".join(str(located.feature.dimension) for located in features)
    plural = "" if len(features) == 1 else "s"
    lines = [
        f"{of.model}, {of.tokens:,} tokens in sequences of {of.sequence_length}",
        f"text: {of.text}",
        f"{len(features)} systematic outlier feature{plural}"
        + (f": {named}" if features else "")
        + f"  (|x| ≥ {of.threshold:g} in ≥ {100 * LAYER_SHARE:.0f} % of layers, "
        f"≥ {100 * POSITION_SHARE:.0f} % of positions)",
        f"{len(massive)} massive activation{'' if len(massive) == 1 else 's'}"
        + (f", the largest {massive[0].largest:,.0f}" if massive else ""),
    ]
    if found.linear_sites:
        lines.append(_predicted(found.linear_sites))
    return lines


class MassiveGroup:
    """A massive activation in one dimension of one kind of site. It often occurs in many consecutive blocks."""

    def __init__(self, kind: str, dimension: int) -> None:
        self.kind, self.dimension = kind, dimension
        self.members: list[LocatedActivation] = []

    @property
    def largest(self) -> float:
        return max((member.activation.value for member in self.members), key=abs)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({member.site.layer for member in self.members if member.site.layer is not None}))

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(sorted({member.activation.position for member in self.members}))

    @property
    def later(self) -> float:
        return max(member.activation.later for member in self.members)


def grouped_massive(found: Iterable[LocatedActivation]) -> list[MassiveGroup]:
    """Massive activations by kind of site and dimension, the largest first."""
    groups: dict[tuple[str, int], MassiveGroup] = {}
    for located in found:
        key = (located.site.kind, located.activation.dimension)
        groups.setdefault(key, MassiveGroup(*key)).members.append(located)
    return sorted(groups.values(), key=lambda group: -abs(group.largest))


def ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7, 9-10`."""
    parts: list[str] = []
    for number in numbers:
        if parts and number == int(parts[-1].rpartition("-")[2]) + 1:
            parts[-1] = f"{parts[-1].partition('-')[0]}-{number}"
        else:
            parts.append(str(number))
    return ", ".join(parts)


def common_prefix(names: Sequence[str]) -> str:
    """The common start of all names, in whole components: `model.layers.`."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(f"{parts[0]}.")
    return "".join(shared)


def _features_table(features: Sequence[LocatedFeature]) -> Table:
    table = titled_table("Outlier features, over norm-fed inputs")
    for name in ("dim", "layers", "positions", "at most", "largest", "sign"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("in layers", overflow="fold")
    for located in features[:MOST_ROWS]:
        feature = located.feature
        table.add_row(
            str(feature.dimension),
            f"{len(located.layers)} of {located.layer_count}",
            f"{100 * feature.position_share:.1f} %",
            f"{100 * feature.peak_share:.1f} %",
            f"{feature.largest:.1f}",
            escape(feature.sign),
            ranges(located.layers),
        )
    table.caption = "positions: mean over all norm-fed inputs · at most: in one layer"
    return table


def _massive_table(groups: Sequence[MassiveGroup]) -> Table:
    table = titled_table("Massive activations (|x| > 100 and > 1000 times the median)")
    table.add_column("where", overflow="fold")
    for name in ("dim", "layers", "value", "position", "later"):
        table.add_column(name, justify="right", overflow="fold")
    for group in groups[:MOST_ROWS]:
        table.add_row(
            f"{escape(group.kind)} input" if group.kind != "residual" else "residual stream",
            str(group.dimension),
            ranges(group.layers),
            f"{group.largest:,.0f}",
            ranges(group.positions),
            f"{group.later:,.1f}",
        )
    table.caption = "later: largest |x| after the first position" + _more(len(groups))
    return table


def _kinds_table(sites: Sequence[SiteStatistics]) -> Table:
    table = titled_table("Inputs of linear layers, by kind")
    table.add_column("kind", no_wrap=True)
    for name in ("inputs", "over", "largest", "int8 weights", "vector-wise"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind in dict.fromkeys(site.kind for site in sites):
        members = [site for site in sites if site.kind == kind]
        table.add_row(
            escape(kind),
            str(len(members)),
            f"{100 * stats.mean(site.inputs.share_of_values_over for site in members):.3f} %",
            f"{max(float(site.inputs.absmax.max()) for site in members):,.1f}",
            *(_median_and_worst(members, int8_inputs=both) for both in (False, True)),
        )
    table.caption = "over: share of values at the threshold · last two: predicted output error, median / worst"
    return table


def _sites_table(sites: Sequence[SiteStatistics]) -> Table:
    prefix = common_prefix([site.name for site in sites])
    worst = sorted(sites, key=lambda site: -site.worst_predicted_error(int8_inputs=True))[:MOST_ROWS]
    table = titled_table("Inputs with the largest predicted error")
    table.add_column(f"input of {escape(prefix)}…" if prefix else "input of", overflow="fold")
    for name in ("dims over", "largest", "at dim", "int8 w.", "vector-wise"):
        table.add_column(name, justify="right", no_wrap=True)
    for site in worst:
        absmax = site.inputs.absmax
        table.add_row(
            escape(site.name.removeprefix(prefix)),
            str(int((site.inputs.share_over > 0).sum())),
            f"{float(absmax.max()):,.1f}",
            str(int(absmax.argmax())),
            f"{site.worst_predicted_error(int8_inputs=False):.4f}",
            f"{site.worst_predicted_error(int8_inputs=True):.4f}",
        )
    table.caption = "dims over: dimensions that reach the threshold" + _more(len(sites))
    return table


def _median_and_worst(sites: Sequence[SiteStatistics], *, int8_inputs: bool) -> str:
    errors = [site.predicted_error(linear, int8_inputs=int8_inputs) for site in sites for linear in site.linears]
    return f"{stats.median(errors):.3f} / {max(errors):.3f}" if errors else "-"


def _more(count: int) -> str:
    return f" · {count - MOST_ROWS} more in the JSON output" if count > MOST_ROWS else ""
