"""Charts of an evaluation by method: perplexity, and agreement with the 16-bit model, as Vega-Lite by altair.

Owns what is drawn and how. Reads result objects. Values that are not finite appear as text only.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from int8cli.report.method_marks import color, compared, dots, reference_label, row_of, rows_axis, written
from int8cli.report.vega import Row, chart_of, logarithmic, require_altair, short
from int8cli.results.evaluation import REFERENCE, Evaluation, MethodResult
from int8cli.results.units import perplexity_text

_WIDTH = 700
_HALF_WIDTH = 220
_SMALLEST_TICK = 1e-5


def perplexity_by_method(found: Evaluation) -> Any:
    """The nats that each method adds to the 16-bit model, with standard errors; perplexities without that model."""
    if any(_over(method) is not None for method in found.methods):
        return _increases(found)
    return _perplexities(found)


def has_agreement(found: Evaluation) -> bool:
    """Whether anything was compared with the predictions of the 16-bit model."""
    return any(method.scores is not None and method.scores.kl_divergence is not None for method in found.methods)


def agreement_by_method(found: Evaluation) -> Any:
    """KL divergence from the 16-bit model, and how often the most likely token is the same."""
    alt = require_altair()
    scores = [(method, method.scores) for method in compared(found) if method.scores is not None]
    divergences = [row_of(method, of.kl_divergence, _figure(of.kl_divergence)) for method, of in scores]
    shares = [row_of(method, of.same_top_share, _percent(of.same_top_share)) for method, of in scores]
    to_divergence = _log_x(divergences, f"KL divergence from {reference_label(found)}, nats")
    to_share = alt.X(
        "value:Q",
        title="most likely token is the same",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format="%", tickCount=5),
    )
    kl = dots(found, divergences, to_divergence, _tooltip("KL divergence")) + written(found, divergences)
    same = dots(found, shares, to_share, _tooltip("same token")) + written(found, shares)
    return alt.hconcat(kl.properties(width=_HALF_WIDTH), same.properties(width=_HALF_WIDTH), spacing=20)


def _increases(found: Evaluation) -> Any:
    """Nats over 16 bit. The axis is linear near 0 and logarithmic beyond, so that one very bad method does not squeeze
    the others."""
    alt = require_altair()
    rows = list(_increase_rows(found))
    scale, ticks = _symmetric_log(rows)
    axis = alt.Axis(values=ticks, format="~g", labelOverlap="greedy")
    over = f"nats over {reference_label(found)}"
    title = f"{over}, ± standard error (0.01 nats: 1 % of perplexity)"
    tooltip = [*_tooltip("perplexity"), alt.Tooltip("value:Q", title=over)]
    tooltip += [alt.Tooltip("error:Q", title="standard error")] if any("error" in row for row in rows) else []
    x = alt.X("value:Q", title=title, scale=scale, axis=axis)
    bars = (
        chart_of([row for row in rows if "error" in row])
        .mark_rule(strokeWidth=2, opacity=0.7)
        .encode(
            x=alt.X("low:Q", title=title, scale=scale, axis=axis),
            x2="high:Q",
            y=rows_axis(found, rows),
            color=color(found, legend=False),
        )
    )
    line = chart_of([{"value": 0}]).mark_rule(strokeDash=[4, 3], opacity=0.8).encode(x=x)
    chart = alt.layer(line, bars, dots(found, rows, x, tooltip), written(found, rows))
    subtitle = f"perplexity at the right; the dashed line is the model in {reference_label(found)}"
    return chart.properties(width=_WIDTH, title=_title("Perplexity by method", subtitle))


def _perplexities(found: Evaluation) -> Any:
    """Perplexities alone, if there is no 16-bit model to compare with."""
    rows = [
        row_of(method, method.scores.perplexity, perplexity_text(method.scores.perplexity))
        for method in found.methods
        if method.scores is not None
    ]
    x = _log_x(rows, "perplexity")
    chart = dots(found, rows, x, _tooltip("perplexity")) + written(found, rows)
    return chart.properties(
        width=_WIDTH, title=_title("Perplexity by method", f"not compared with {reference_label(found)}")
    )


def _increase_rows(found: Evaluation) -> Iterator[Row]:
    for method in found.methods:
        if method.scores is None:
            continue
        value = 0.0 if method.key == REFERENCE else _over(method)
        row = row_of(method, value, perplexity_text(method.scores.perplexity))
        error = method.scores.standard_error
        if value is not None and error is not None and math.isfinite(error):
            row |= {"low": short(value - error), "high": short(value + error), "error": short(error)}
        yield row


def _over(method: MethodResult) -> float | None:
    value = None if method.scores is None else method.scores.nats_over_reference
    return value if value is not None and math.isfinite(value) else None


def _symmetric_log(rows: Sequence[Row]) -> tuple[Any, list[float]]:
    """A scale that fits all bars with a margin at both ends, and its ticks."""
    alt = require_altair()
    tick = _first_tick(rows)
    constant = tick / 3
    ends = [end for row in rows for end in (row["value"], row.get("low"), row.get("high")) if end is not None]
    low, high = (_bent(end, constant) for end in (min(ends), max(ends)))
    margin = 0.04 * (high - low) or 1.0
    domain = [_straight(low - margin, constant), _straight(high + margin, constant)]
    reach = max(-domain[0], domain[1])
    steps = (1,) if reach > 1000 * tick else (1, 3) if reach > 100 * tick else (1, 2, 5)
    positive = [step * tick * 10.0**power for power in range(12) for step in steps]
    ticks = [0.0, *(float(f"{sign * value:.3g}") for value in positive for sign in (1, -1))]
    scale = alt.Scale(type="symlog", constant=constant, domain=domain, nice=False)
    return scale, sorted(value for value in ticks if domain[0] <= value <= domain[1])


def _first_tick(rows: Sequence[Row]) -> float:
    """The power of ten where the axis becomes logarithmic: near the smallest standard error, or else difference."""
    values = [row["error"] for row in rows if row.get("error")] or [abs(row["value"]) for row in rows if row["value"]]
    return max(10.0 ** round(math.log10(min(values))), _SMALLEST_TICK) if values else 0.01


def _bent(value: float, constant: float) -> float:
    return math.copysign(math.log1p(abs(value) / constant), value)


def _straight(value: float, constant: float) -> float:
    return math.copysign(math.expm1(abs(value)) * constant, value)


def _log_x(rows: Sequence[Row], title: str) -> Any:
    """A logarithmic axis. Values that are not positive are not drawn."""
    for row in rows:
        row["value"] = row["value"] if row["value"] is not None and row["value"] > 0 else None
    values = [row["value"] for row in rows if row["value"] is not None] or [1.0]
    room = max((max(values) / min(values)) ** 0.05, 1.1)
    return require_altair().X("value:Q", title=title, **logarithmic(values, room))


def _tooltip(of: str) -> list[Any]:
    return ["method:N", require_altair().Tooltip("text:N", title=of)]


def _title(title: str, subtitle: str) -> Any:
    return require_altair().TitleParams(title, subtitle=subtitle, anchor="start")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if math.isfinite(value) else "not finite"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
