"""Charts of outlier statistics, as Vega-Lite by altair; the heatmap as a picture too.

Owns what is drawn and how. Reads result objects only.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from int8cli.outliers.statistics import RESIDUAL, OutlierStatistics, SiteStatistics
from int8cli.outliers.suspects import WeightSuspects
from int8cli.report.layer_charts import layer_axis
from int8cli.report.vega import (
    HOT,
    PAPER,
    DoublingSteps,
    Row,
    chart_of,
    finished,
    logarithmic,
    require_altair,
    save_chart,
    short,
    stacked,
)

MOST_DIMENSIONS = 48
MOST_LINES = 8
_WIDTH = 720
_KIND_ORDER = ["norm-fed", "attention output", "second feed-forward", RESIDUAL]
_KIND_COLORS = ["#2a78d6", "#e08a00", "#199e70", "#8a8f98"]
_LINE_COLORS = ["#2a78d6", "#e08a00", "#199e70", "#c0392b", "#7e57c2", "#6d4c41", "#d6589f", "#5f6b7a"]


def write_picture(statistics: OutlierStatistics | WeightSuspects, path: Path) -> None:
    """Write the heatmap as .png or .svg, whole or not at all. Raises OutputError, MissingExtraError."""
    require_altair()
    chart = heatmap(statistics) if isinstance(statistics, OutlierStatistics) else suspects_heatmap(statistics)
    save_chart(chart, path)


def heatmap(statistics: OutlierStatistics) -> Any:
    """Layer by dimension: the largest |x| over the norm-fed inputs, for the dimensions with the largest values."""
    threshold = statistics.provenance.threshold
    charts = []
    for stack, layers in statistics.norm_fed_layers().items():
        rows = list(_heatmap_rows(layers))
        title = f"Largest |x| by layer and dimension, norm-fed inputs of {stack}"
        subtitle = f"the {len({row['dimension'] for row in rows})} largest dimensions; red: {threshold:g} or more"
        charts.append(_heatmap(rows, sorted(layers), title, subtitle, threshold))
    return stacked(charts, "no norm-fed inputs were found")


def suspects_heatmap(found: WeightSuspects) -> Any:
    """The same for predictions from the weights: suspects."""
    charts = []
    for stack in dict.fromkeys(site.stack for site in found.sites):
        sites = [site for site in found.sites if site.stack == stack]
        scores = torch.stack([site.score for site in sites])
        shown = sorted(scores.amax(dim=0).topk(min(MOST_DIMENSIONS, scores.shape[1])).indices.tolist())
        rows: list[Row] = []
        for layer in sorted({site.layer for site in sites}):
            members = [site for site in sites if site.layer == layer]
            for dimension in shown:
                best = max(members, key=lambda site: float(site.score[dimension]))
                value = float(best.score[dimension])
                rows.append({"layer": layer, "dimension": dimension, "value": short(value), "site": best.name})
        layers = sorted({site.layer for site in sites})
        title = f"Suspects: predicted magnitude by layer and dimension, {stack}"
        charts.append(_heatmap(rows, layers, title, "from the weights alone, relative to the other dimensions", None))
    return stacked(charts, "no norms were found")


def features_by_layer(statistics: OutlierStatistics) -> Any:
    """Magnitude and share of positions by layer, of the outlier features or else of the largest dimensions."""
    rows: list[Row] = []
    for stack, layers in statistics.norm_fed_layers().items():
        for dimension in _dimensions_to_follow(statistics, stack, layers):
            for layer, sites in sorted(layers.items()):
                best = max(sites, key=lambda site: float(site.inputs.absmax[dimension]))
                rows.append(
                    {
                        "layer": layer,
                        "dimension": str(dimension)
                        if len(statistics.norm_fed_layers()) == 1
                        else f"{stack} {dimension}",
                        "largest": short(float(best.inputs.absmax[dimension])),
                        "share": short(max(float(site.inputs.share_over[dimension]) for site in sites)),
                        "site": best.name,
                    }
                )
    alt = require_altair()
    common = {
        "x": layer_axis([row["layer"] for row in rows], "layer", labels=True, field="layer"),
        "color": alt.Color("dimension:N", title="dimension", scale=alt.Scale(range=_LINE_COLORS), legend=_legend(8)),
        "tooltip": [
            "layer:Q",
            "dimension:N",
            alt.Tooltip("largest:Q", format=".3~g"),
            alt.Tooltip("share:Q", format=".2~%"),
            "site:N",
        ],
    }
    rule = chart_of([{"y": statistics.provenance.threshold}]).mark_rule(strokeDash=[4, 4], opacity=0.6)
    magnitude = (
        _lines(rows)
        .encode(y=alt.Y("largest:Q", title="largest |x|"), **common)
        .properties(width=_WIDTH // 2 - 60, height=220, title="Magnitude")
    )
    share = (
        _lines(rows)
        .encode(
            y=alt.Y("share:Q", title="share of positions", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
            **common,
        )
        .properties(width=_WIDTH // 2 - 60, height=220, title="Share of positions at the threshold")
    )
    return finished(alt.hconcat(magnitude + rule.encode(y="y:Q"), share))


def magnitudes_by_layer(statistics: OutlierStatistics) -> Any:
    """The largest |x| of each kind of input by layer, on a log scale: where massive activations are."""
    alt = require_altair()
    furthest: dict[tuple[str | None, int, str], SiteStatistics] = {}
    for site in statistics.sites:
        if site.layer is not None:
            key = (site.stack, site.layer, site.kind)
            known = furthest.get(key)
            if known is None or site.inputs.absmax.max() > known.inputs.absmax.max():
                furthest[key] = site
    rows: list[Row] = [
        {
            "layer": layer,
            "kind": kind,
            "line": f"{stack} {kind}",
            "largest": short(max(float(site.inputs.absmax.max()), 1e-3)),
            "dimension": int(site.inputs.absmax.argmax()),
            "position": int(site.inputs.absmax_position[site.inputs.absmax.argmax()]),
            "site": site.name,
        }
        for (stack, layer, kind), site in furthest.items()
    ]
    chart = _lines(rows).encode(
        x=layer_axis([row["layer"] for row in rows], "layer", labels=True, field="layer"),
        y=alt.Y("largest:Q", title="largest |x|", **logarithmic([row["largest"] for row in rows], 1.18)),
        color=_kind_color(rows),
        detail="line:N",
        tooltip=["site:N", "kind:N", "layer:Q", "dimension:Q", "position:Q", alt.Tooltip("largest:Q", format=".3~g")],
    )
    return finished(chart.properties(width=_WIDTH, height=240))


def errors_by_layer(statistics: OutlierStatistics) -> Any:
    """The predicted output error of each linear, by layer: with int8 weights alone, and vector-wise."""
    alt = require_altair()
    rows: list[Row] = [
        {
            "layer": site.layer,
            "kind": site.kind,
            "linear": linear.name,
            "method": method,
            "error": short(max(site.predicted_error(linear, int8_inputs=both), 1e-6)),
        }
        for site in statistics.linear_sites
        if site.layer is not None
        for linear in site.linears
        for method, both in (("int8 weights, 16-bit inputs", False), ("vector-wise int8", True))
    ]
    panels = []
    for method in dict.fromkeys(row["method"] for row in rows):
        points = chart_of([row for row in rows if row["method"] == method]).mark_point(
            filled=True, size=34, opacity=0.75
        )
        panel = points.encode(
            x=layer_axis([row["layer"] for row in rows], "layer", labels=True, field="layer"),
            y=alt.Y("error:Q", title="relative output error", **_share_axis(rows)),
            color=_kind_color(rows),
            tooltip=["linear:N", "kind:N", "layer:Q", "method:N", alt.Tooltip("error:Q", format=".2~%")],
        )
        panels.append(panel.properties(width=_WIDTH // 2 - 60, height=240, title=method))
    return finished(alt.hconcat(*panels))


def _share_axis(rows: Sequence[Row]) -> dict[str, Any]:
    """The same logarithmic axis of percents for all panels."""
    found = logarithmic([row["error"] for row in rows], 1.18)
    found["axis"].format = ".2~%"
    return found


def _heatmap_rows(layers: dict[int, tuple[SiteStatistics, ...]]) -> Iterator[Row]:
    absmax = torch.stack([torch.stack([s.inputs.absmax for s in layers[n]]).amax(dim=0) for n in sorted(layers)])
    shown = sorted(absmax.amax(dim=0).topk(min(MOST_DIMENSIONS, absmax.shape[1])).indices.tolist())
    for layer in sorted(layers):
        for dimension in shown:
            best = max(layers[layer], key=lambda site: float(site.inputs.absmax[dimension]))
            yield {
                "layer": layer,
                "dimension": dimension,
                "value": short(float(best.inputs.absmax[dimension])),
                "minimum": short(float(best.inputs.minimum[dimension])),
                "maximum": short(float(best.inputs.maximum[dimension])),
                "share": short(float(best.inputs.share_over[dimension])),
                "site": best.name,
            }


def _heatmap(rows: Sequence[Row], layers: Sequence[int], title: str, subtitle: str, threshold: float | None) -> Any:
    """Cells of one stack, in steps that double. With a threshold, values at or above it are red; without one, the
    largest values are."""
    alt = require_altair()
    largest = max((row["value"] for row in rows), default=1.0)
    # Without a threshold, the last step ends at the largest value.
    steps = DoublingSteps(threshold if threshold is not None else max(largest, 1e-6) / 2 ** (len(HOT) - 1))
    rows = [{**row, "step": steps.name_of(row["value"])} for row in rows]
    tooltip = [
        "layer:O",
        "dimension:O",
        alt.Tooltip("value:Q", title="largest |x|" if threshold else "predicted", format=".3~g"),
    ]
    if threshold is not None:
        tooltip += [
            *(alt.Tooltip(f"{end}:Q", format=".3~g") for end in ("minimum", "maximum")),
            alt.Tooltip("share:Q", title="positions over", format=".2%"),
        ]
    step = 13 if len(layers) <= 40 else 10
    shown = [layer for layer in layers if len(layers) <= 40 or layer % 5 == 0]
    return (
        chart_of(rows)
        .mark_rect(stroke=PAPER, strokeWidth=0.5)
        .encode(
            x=alt.X(
                "dimension:O", title="dimension", axis=alt.Axis(labelAngle=-90, labelFontSize=9, labelOverlap=True)
            ),
            y=alt.Y("layer:O", title="layer", sort="descending", axis=alt.Axis(values=shown)),
            color=alt.Color(
                "step:N", title="largest |x|" if threshold else "score", scale=steps.scale(), legend=_legend(8)
            ),
            tooltip=[*tooltip, "site:N"],
        )
        .properties(
            width=_WIDTH,
            height={"step": step},
            title=alt.TitleParams(title, subtitle=subtitle, anchor="start"),
        )
    )


def _dimensions_to_follow(
    statistics: OutlierStatistics, stack: str, layers: dict[int, tuple[SiteStatistics, ...]]
) -> list[int]:
    """The systematic features, then the dimensions with the largest values, a few in total."""
    found = [located.feature.dimension for located in statistics.features() if located.stack == stack]
    absmax = torch.stack([site.inputs.absmax for sites in layers.values() for site in sites]).amax(dim=0)
    largest = absmax.topk(min(MOST_LINES, absmax.numel())).indices.tolist()
    least = len(found) if found else 4
    return list(dict.fromkeys([*found, *largest]))[: min(MOST_LINES, max(least, 4))]


def _kind_color(rows: Sequence[Row]) -> Any:
    alt = require_altair()
    shown = [kind for kind in _KIND_ORDER if any(row["kind"] == kind for row in rows)]
    colors = [_KIND_COLORS[_KIND_ORDER.index(kind)] for kind in shown]
    return alt.Color(
        "kind:N", title="input", sort=shown, scale=alt.Scale(domain=shown, range=colors), legend=_legend(4)
    )


def _lines(rows: Sequence[Row]) -> Any:
    alt = require_altair()
    return chart_of(rows).mark_line(point=alt.OverlayMarkDef(size=28), strokeWidth=1.5)


def _legend(columns: int) -> Any:
    """Above the chart, so that it takes nothing from the chart's width. More than four columns are for short labels."""
    alt = require_altair()
    return alt.Legend(
        orient="top", direction="horizontal", type="symbol", labelLimit=200, columns=columns, symbolOpacity=1
    )
