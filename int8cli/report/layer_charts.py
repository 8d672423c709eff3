"""The chart of an evaluation's output errors by layer, as Vega-Lite by altair.

Owns what is drawn and how: a panel for each place in a block, a line for each method.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from int8cli.report.layer_roles import OUTSIDE, places
from int8cli.report.method_marks import color, compared, reference_label, shape
from int8cli.report.vega import Row, chart_of, logarithmic, require_altair, short
from int8cli.results.evaluation import Evaluation, LayerError, MethodResult

_WIDTH = 395
_HEIGHT = 165
_COLUMNS = 2
_FEW_LAYERS = 40
_MOST_TICKS = 15


def has_errors(found: Evaluation) -> bool:
    return any(method.layers for method in found.methods)


def errors_by_layer(found: Evaluation) -> Any:
    """Panels on one logarithmic scale. A click on a name in the legend shows only that method."""
    alt = require_altair()
    panels = _panels([method for method in compared(found) if method.layers])
    chosen = alt.selection_point(name="chosen", fields=["method"], bind="legend")
    errors = [row["value"] for rows in panels.values() for row in rows if row["value"] is not None]
    y = alt.Y("value:Q", **logarithmic(errors, 1.18))
    drawn: list[Any] = []
    for place, (role, rows) in enumerate(panels.items()):
        left, bottom = place % _COLUMNS == 0, place >= len(panels) - _COLUMNS
        x = layer_axis([row["number"] for row in rows], "block" if bottom else None, labels=role != OUTSIDE)
        panel = _panel(found, rows, chosen).encode(x=x, y=y.title("output error" if left else None))
        title = alt.TitleParams(role, anchor="start", fontSize=12, fontWeight="normal", limit=_WIDTH)
        # One panel owns the selection; the others follow it.
        panel = panel if drawn else panel.add_params(chosen)
        drawn.append(panel.properties(width=_WIDTH, height=_HEIGHT, title=title))
    subtitle = f"on {found.error_tokens:,} tokens; every layer gets the input it has in {reference_label(found)}"
    title = alt.TitleParams("Output error by layer, relative to the output", subtitle=subtitle, anchor="start")
    return alt.concat(*drawn, columns=_COLUMNS, spacing=20).properties(title=title)


@dataclass(slots=True)
class _Point:
    """The worst of the layers that share a place, and their number."""

    worst: LayerError
    layers: int = 1

    def take(self, layer: LayerError) -> None:
        self.layers += 1
        if layer.error > self.worst.error:
            self.worst = layer


def _panels(methods: Sequence[MethodResult]) -> dict[str, list[Row]]:
    """The rows of each panel, in the model's order."""
    panels: dict[str, list[Row]] = {}
    for method in methods:
        points: dict[tuple[str, int], _Point] = {}
        for layer, place in zip(method.layers, places(method.layers), strict=True):
            key = (place.role, place.number)
            if key in points:
                points[key].take(layer)
            else:
                points[key] = _Point(layer)
        for (role, number), point in points.items():
            panels.setdefault(role, []).append(_row(method, number, point))
    return panels


def _row(method: MethodResult, number: int, point: _Point) -> Row:
    worst = point.worst
    return {
        "layer": worst.name if point.layers == 1 else f"{worst.name}, the worst of {point.layers}",
        "input": worst.kind,
        "number": number,
        "method": method.label,
        "value": short(worst.error) if math.isfinite(worst.error) and worst.error > 0 else None,
    }


def _panel(found: Evaluation, rows: Sequence[Row], chosen: Any) -> Any:
    """One line per method. Lines and points name the same legend: without that, it loses its shapes or disappears."""
    alt = require_altair()
    base = chart_of(rows).encode(
        color=color(found, legend=True), opacity=alt.condition(chosen, alt.value(0.9), alt.value(0.06))
    )
    few = len({row["number"] for row in rows}) <= _FEW_LAYERS
    points = base.mark_point(filled=True, size=30 if few else 16).encode(
        shape=shape(found, legend=True),
        tooltip=["layer:N", "input:N", "method:N", alt.Tooltip("value:Q", title="output error")],
    )
    return base.mark_line(strokeWidth=1.2) + points


def layer_axis(numbers: Sequence[int], title: str | None, *, labels: bool, field: str = "number") -> Any:
    """The axis of block numbers. Layers outside the blocks have no block number, and get no labels."""
    alt = require_altair()
    scale = alt.Scale(domain=[min(numbers) - 0.5, max(numbers) + 0.5], nice=False)
    span = max(numbers) - min(numbers) + 1
    step = next((step for step in (1, 2, 5, 10, 20, 50) if span <= _MOST_TICKS * step), 100)
    ticks = [number for number in range(min(numbers), max(numbers) + 1) if number % step == 0]
    axis = alt.Axis(values=ticks, format="d", grid=False, labels=labels, ticks=labels)
    return alt.X(f"{field}:Q", title=title if labels else None, scale=scale, axis=axis)
