"""Charts of a conversion's report, as Vega-Lite by altair: errors by kind and by depth, and the stored columns.

Owns what is drawn and how. Errors that were not measured are left out.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from int8cli.report.layer_charts import layer_axis
from int8cli.report.layer_roles import OUTSIDE, places_by_name
from int8cli.report.vega import Row, chart_of, logarithmic, require_altair, short
from int8cli.results.conversion import ConversionReport, LayerReport, summarize_kinds
from int8cli.results.units import percent

WEIGHTS = "weights"
PLAIN = "outputs, plain int8"
EXACT = "outputs, with exact columns"
MOST_COLUMNS = 6000  # on the map
_LOOKS = {WEIGHTS: ("#7f8a99", "diamond"), PLAIN: ("#d98200", "square"), EXACT: ("#3a7fe0", "circle")}
_WIDTH = 395
_HEIGHT = 150


def errors_of(report: ConversionReport, layer: LayerReport) -> dict[str, float]:
    """The errors of a layer that are known, by what they are the error of."""
    found = {}
    if layer.sums is not None:
        found[WEIGHTS] = layer.sums.relative_frobenius_error
    stored = report.stored
    output = layer.stored.output_error(stored.basis) if stored and stored.basis and layer.stored else None
    if output is not None:
        found[PLAIN], found[EXACT] = output.all_int8, output.with_stored
    return found


def has_errors(report: ConversionReport) -> bool:
    return any(_drawable(error) for layer in report.layers for error in errors_of(report, layer).values())


def errors_by_kind(report: ConversionReport) -> Any:
    """One row for each kind of layer, with a mark for each error: weights in total, outputs as mean of the layers."""
    alt = require_altair()
    rows = [row for row in _kind_rows(report) if _drawable(row["value"])]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    y = alt.Y(
        "kind:N",
        title=None,
        sort=kinds,
        axis=alt.Axis(labelLimit=260, ticks=False, domain=False, labelPadding=8, grid=True),
    )
    chart = chart_of(rows).mark_point(filled=True, size=80, opacity=1)
    return chart.encode(
        x=alt.X("value:Q", title="relative error", **_axis([row["value"] for row in rows])),
        y=y,
        color=_color(rows),
        shape=_shape(rows),
        tooltip=["kind:N", alt.Tooltip("of:N", title="error of"), alt.Tooltip("text:N", title="error")],
    ).properties(width=600, height=alt.Step(24))


def errors_by_depth(report: ConversionReport) -> Any:
    """Panels by the role of a layer in its block, all on one logarithmic scale."""
    alt = require_altair()
    panels = _panels(report)
    values = [row["value"] for rows in panels.values() for row in rows]
    all_rows = [row for rows in panels.values() for row in rows]
    y = alt.Y("value:Q", **_axis(values))
    drawn: list[Any] = []
    for role, rows in panels.items():
        x = layer_axis([row["number"] for row in rows], "block", labels=role != OUTSIDE)
        base = chart_of(rows).encode(x=x, y=y.title("relative error"), color=_color(all_rows))
        points = base.mark_point(filled=True, size=24).encode(
            shape=_shape(all_rows),
            tooltip=["layer:N", alt.Tooltip("of:N", title="error of"), alt.Tooltip("text:N", title="error")],
        )
        panel = base.mark_line(strokeWidth=1.2) + points
        drawn.append(panel.properties(width=_WIDTH, height=_HEIGHT, title=_panel_title(role)))
    return alt.concat(*drawn, columns=2, spacing=20)


def columns_map(report: ConversionReport) -> Any:
    """A panel for each role: blocks from top to bottom, input columns from left to right, a mark where one is stored.

    A mark is the stronger, the larger its share of the error that int8 would cause without it.
    """
    alt = require_altair()
    panels = _column_panels(report)
    drawn = []
    for role, (width, rows) in panels.items():
        x = alt.X("column:Q", title="input column", scale=alt.Scale(domain=[0, width], nice=False))
        y = alt.Y("block:Q", title="block", scale=alt.Scale(reverse=True, nice=False, padding=6), axis=_whole_axis())
        strength = alt.Opacity("strength:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=[0.35, 1]))
        panel = chart_of(rows).mark_tick(orient="vertical", thickness=2.5, height=6, color=_LOOKS[EXACT][0])
        panel = panel.encode(x=x, y=y, opacity=strength, tooltip=_column_tooltip(rows))
        drawn.append(panel.properties(width=_WIDTH, height=_HEIGHT, title=_panel_title(role)))
    return alt.concat(*drawn, columns=2, spacing=20)


def columns_drawn(report: ConversionReport) -> int:
    return min(MOST_COLUMNS, sum(len(layer.stored.columns) for layer in report.layers if layer.stored))


def _kind_rows(report: ConversionReport) -> Iterator[Row]:
    stored = report.stored
    outputs = {kind.kind: kind.error for kind in stored.kinds} if stored is not None else {}
    for kind in summarize_kinds(report.layers):
        known = {} if kind.sums is None else {WEIGHTS: kind.sums.relative_frobenius_error}
        output = outputs.get(kind.kind)
        if output is not None:
            known |= {PLAIN: output.all_int8, EXACT: output.with_stored}
        for of, value in known.items():
            yield {"kind": kind.kind, "of": of, "value": short(value), "text": percent(value)}


@dataclass(slots=True)
class _Worst:
    """The largest error of the layers that share a place, such as the experts of a block."""

    name: str
    error: float
    layers: int = 1

    def take(self, name: str, error: float) -> None:
        self.layers += 1
        if error > self.error:
            self.name, self.error = name, error


def _panels(report: ConversionReport) -> dict[str, list[Row]]:
    """The rows of each panel, by depth. Roles are in the order of the first block."""
    layers = sorted(report.layers, key=lambda layer: layer.name)
    points: dict[tuple[str, int, str], _Worst] = {}
    for layer, place in zip(layers, places_by_name([layer.name for layer in layers]), strict=True):
        for of, error in errors_of(report, layer).items():
            key = (place.role, place.number, of)
            if key in points:
                points[key].take(layer.name, error)
            elif _drawable(error):
                points[key] = _Worst(layer.name, error)
    panels: dict[str, list[Row]] = {}
    for (role, number, of), worst in sorted(points.items(), key=lambda item: item[0][1]):
        name = worst.name if worst.layers == 1 else f"{worst.name}, the worst of {worst.layers}"
        row = {"layer": name, "number": number, "of": of, "value": short(worst.error), "text": percent(worst.error)}
        panels.setdefault(role, []).append(row)
    return dict(sorted(panels.items()))


def _column_panels(report: ConversionReport) -> dict[str, tuple[int, list[Row]]]:
    """The width of the input and the stored columns of each role; if there are very many, the heaviest."""
    layers = sorted((layer for layer in report.layers if layer.stored), key=lambda layer: layer.name)
    rows: list[tuple[str, int, Row]] = []
    for layer, place in zip(layers, places_by_name([layer.name for layer in layers]), strict=True):
        columns = layer.stored.columns if layer.stored else ()
        heaviest = max((column.error_share or column.suspicion or 0.0 for column in columns), default=0.0)
        for column in columns:
            weight = column.error_share or column.suspicion or 0.0
            row: Row = {"layer": layer.name, "block": place.number, "column": column.index}
            row["strength"] = short(weight / heaviest) if heaviest else 1.0
            if column.absmax is not None:
                row["absmax"] = short(column.absmax)
            if column.error_share is not None:
                row["share"] = percent(column.error_share)
            rows.append((place.role, layer.shape[1], row))
    rows = sorted(rows, key=lambda each: -each[2]["strength"])[:MOST_COLUMNS]
    panels: dict[str, tuple[int, list[Row]]] = {}
    for role, width, row in rows:
        known = panels.get(role, (0, []))
        panels[role] = max(known[0], width), [*known[1], row]
    return dict(sorted(panels.items()))


def _column_tooltip(rows: Sequence[Row]) -> list[Any]:
    alt = require_altair()
    tooltip = ["layer:N", alt.Tooltip("column:Q", title="input column")]
    if any("absmax" in row for row in rows):
        tooltip.append(alt.Tooltip("absmax:Q", title="largest |x|", format=".3~g"))
    if any("share" in row for row in rows):
        tooltip.append(alt.Tooltip("share:N", title="share of the layer's error"))
    return tooltip


def _axis(values: Sequence[float]) -> dict[str, Any]:
    found = logarithmic(values, 1.18)
    found["axis"].format = ".2~%"
    return found


def _drawable(error: float) -> bool:
    """Whether it has a place on a logarithmic scale."""
    return math.isfinite(error) and error > 0


def _color(rows: Sequence[Row]) -> Any:
    return require_altair().Color("of:N", scale=_scale(rows, 0), legend=_legend())


def _shape(rows: Sequence[Row]) -> Any:
    return require_altair().Shape("of:N", scale=_scale(rows, 1), legend=_legend())


def _scale(rows: Sequence[Row], look: int) -> Any:
    shown = [of for of in _LOOKS if any(row["of"] == of for row in rows)]
    return require_altair().Scale(domain=shown, range=[_LOOKS[of][look] for of in shown])


def _legend() -> Any:
    return require_altair().Legend(title=None, orient="top", columns=3, labelLimit=260, symbolOpacity=1)


def _panel_title(role: str) -> Any:
    return require_altair().TitleParams(role, anchor="start", fontSize=12, fontWeight="normal")


def _whole_axis() -> Any:
    return require_altair().Axis(format="d", tickMinStep=1, grid=False)
