"""How a method looks in every chart of an evaluation: its color, its shape, its row.

Because of this module, a method looks the same on the page and in pictures.
"""

import math
from collections.abc import Sequence
from typing import Any

from int8cli.report.vega import Row, chart_of, require_altair, short
from int8cli.results.evaluation import REFERENCE, Evaluation, MethodResult
from int8cli.results.method_names import loaders_of

# Each color stands out on a white and on a dark page, and from its neighbors. When colors repeat, the shape differs.
_COLORS = ("#c8452f", "#d98200", "#8a8d1c", "#2e9c5b", "#1a9fae", "#3a7fe0", "#8f67d8", "#d655a0", "#a9714b", "#7f8a99")
_SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
_REFERENCE_COLOR = "#7f8a99"
_ROW_HEIGHT = 22
_LEGEND_COLUMNS = 4


def compared(found: Evaluation) -> list[MethodResult]:
    """All methods but the 16-bit model."""
    return [method for method in found.methods if method.key != REFERENCE]


def reference_label(found: Evaluation) -> str:
    """The name of the model that the methods are compared with."""
    reference = found.method(REFERENCE)
    return "16 bit" if reference is None else reference.label


def color(found: Evaluation, *, legend: bool) -> Any:
    alt = require_altair()
    return alt.Color(
        "method:N", scale=_scale(found, _COLORS, _REFERENCE_COLOR), legend=_legend(found) if legend else None
    )


def shape(found: Evaluation, *, legend: bool) -> Any:
    scale = _scale(found, _SHAPES, "circle")
    return require_altair().Shape("method:N", scale=scale, legend=_legend(found) if legend else None)


def _scale(found: Evaluation, looks: Sequence[Any], of_reference: Any) -> Any:
    """The marks of the methods in the table's order, repeating; the 16-bit model has its own."""
    labels = [method.label for method in compared(found)]
    chosen = [looks[place % len(looks)] for place in range(len(labels))]
    reference = [method.label for method in found.methods if method.key == REFERENCE]
    return require_altair().Scale(domain=[*labels, *reference], range=[*chosen, *([of_reference] * len(reference))])


def row_of(method: MethodResult, value: float | None, written: str) -> Row:
    """A row of chart data for a method: the value if it is finite, and always its text."""
    finite = value is not None and math.isfinite(value)
    return {"method": method.label, "value": short(value) if finite and value is not None else None, "text": written}


def rows_axis(found: Evaluation, rows: Sequence[Row]) -> Any:
    """One row per method, in the table's order. The names of those that loaders compute are bold."""
    alt = require_altair()
    loaded = [method.label for method in found.methods if method.key in loaders_of(found)]
    weight = alt.condition(alt.FieldOneOfPredicate("value", loaded), alt.value("bold"), alt.value("normal"))
    axis = alt.Axis(labelLimit=260, ticks=False, domain=False, labelPadding=8, grid=True, labelFontWeight=weight)
    return alt.Y("method:N", title=None, sort=[row["method"] for row in rows], axis=axis)


def dots(found: Evaluation, rows: Sequence[Row], x: Any, tooltip: Sequence[Any]) -> Any:
    """One dot per method, at its value."""
    marks = chart_of(rows).mark_point(filled=True, size=70, opacity=1)
    return marks.encode(
        x=x,
        y=rows_axis(found, rows),
        color=color(found, legend=False),
        shape=shape(found, legend=False),
        tooltip=list(tooltip),
    ).properties(height={"step": _ROW_HEIGHT})


def written(found: Evaluation, rows: Sequence[Row]) -> Any:
    """The values as text, in a column to the right of a chart."""
    alt = require_altair()
    marks = chart_of(rows).mark_text(align="left", fontSize=11, dx=10)
    return marks.encode(x=alt.value("width"), y=rows_axis(found, rows), text="text:N")


def _legend(found: Evaluation) -> Any:
    """The legend. It leaves out the 16-bit model, which has no errors."""
    return require_altair().Legend(
        title=None,
        orient="top",
        columns=_LEGEND_COLUMNS,
        columnPadding=28,
        labelLimit=260,
        symbolOpacity=1,
        values=[method.label for method in compared(found)],
    )
