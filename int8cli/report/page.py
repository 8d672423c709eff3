"""The report as one HTML page that fetches nothing: charts by Vega, which is in the page, and tables that sort.

Owns the page's markup, style and script.
"""

import html
import importlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from int8cli.checkpoint.writer import write_file
from int8cli.outlier_statistics import OutlierStatistics
from int8cli.report import charts
from int8cli.report.outliers import grouped_massive, ranges, summary_lines, suspects_caveat
from int8cli.weight_suspects import WeightSuspects

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; background: #fff; margin: 0 auto; max-width: 1020px;
       padding: 24px 20px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 6px; }
p { margin: 4px 0; } .note { color: #5a6372; } .chart { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; margin-top: 8px; }
th, td { padding: 3px 12px 3px 0; text-align: left; white-space: nowrap; }
td.n, th.n { text-align: right; }
th { border-bottom: 1px solid #c9d0da; color: #3c4554; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #2a78d6; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
tbody tr:nth-child(even) { background: #f6f8fa; } .scroll { overflow: auto; max-height: 560px; }
"""
_SCRIPT = """
for (const [id, spec] of Object.entries(charts)) {
  vegaEmbed('#' + id, spec, {actions: false, renderer: 'svg'});
}
for (const table of document.querySelectorAll('table')) {
  table.querySelectorAll('th').forEach((head, column) => {
    head.querySelector('button').addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') !== 'descending';
      table.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const numeric = head.classList.contains('n');
      const rows = [...table.tBodies[0].rows].sort((a, b) =>
        (numeric ? key(a) - key(b) : key(a).localeCompare(key(b), undefined, {numeric: true})) * (down ? -1 : 1));
      table.tBodies[0].append(...rows);
    });
  });
}
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
<script>{library}</script>
<script>const charts = {specs};{script}</script>
</body>
</html>
"""

# A cell is text, or a number with the text it is shown as.
Cell = str | tuple[float, str]


def write_page(found: OutlierStatistics | WeightSuspects, path: Path) -> None:
    """Write the page, whole or not at all. Raises OutputError, MissingExtraError."""
    charts.require_altair()
    text = statistics_page(found) if isinstance(found, OutlierStatistics) else suspects_page(found)
    write_file(path, text.encode())


def statistics_page(found: OutlierStatistics) -> str:
    """The page for what a calibration found."""
    features, massive = found.features(), grouped_massive(found.massive())
    of = found.provenance
    threshold = f"{of.threshold:g}"
    lines = summary_lines(found, features, massive)
    drawn = {
        "heatmap": charts.heatmap(found),
        "features": charts.features_by_layer(found),
        "magnitudes": charts.magnitudes_by_layer(found),
        "errors": charts.errors_by_layer(found),
    }
    body = [
        f"<h1>Outliers of {html.escape(of.model)}</h1>",
        *(f"<p>{html.escape(line)}</p>" for line in lines[1:]),
        f'<p class="note">{of.tokens:,} tokens in sequences of {of.sequence_length}, seed {of.seed}, {of.dtype}'
        + (f", revision {html.escape(of.revision)}" if of.revision else "")
        + "</p>",
        _section("Layer by dimension", "heatmap", ""),
        _section("Features by layer", "features", "The systematic features, and the dimensions that reach furthest."),
        _table(
            ("dimension", "stack", "layers", "of", "positions", "at most", "largest", "sign", "in layers"),
            [
                (
                    _whole(located.feature.dimension),
                    located.stack,
                    _whole(len(located.layers)),
                    _whole(located.layer_count),
                    _share(located.feature.position_share),
                    _share(located.feature.peak_share),
                    _number(located.feature.largest),
                    located.feature.sign,
                    ranges(located.layers),
                )
                for located in features
            ],
            f"No dimension reaches {threshold} in enough layers and positions.",
        ),
        _section("Magnitudes", "magnitudes", "The largest |x| of each input, by its kind."),
        "<h2>Massive activations</h2>",
        _table(
            ("where", "dimension", "layers", "value", "position", "later"),
            [
                (
                    group.kind,
                    _whole(group.dimension),
                    ranges(group.layers),
                    _number(group.largest),
                    ranges(group.positions),
                    _number(group.later),
                )
                for group in massive
            ],
            "None.",
        ),
        _section("Predicted output error", "errors", "Expected ‖error‖ / ‖X Wᵀ‖ of each linear layer."),
        "<h2>Inputs of linear layers</h2>",
        _table(
            ("input of", "kind", "layer", "dims over", "values over", "largest", "at", "int8 weights", "vector-wise"),
            [
                (
                    site.name,
                    site.kind,
                    _whole(site.layer) if site.layer is not None else (-1.0, ""),
                    _whole(int((site.inputs.share_over > 0).sum())),
                    _share(site.inputs.share_of_values_over),
                    _number(float(site.inputs.absmax.max())),
                    _whole(int(site.inputs.absmax.argmax())),
                    _number(site.worst_predicted_error(int8_inputs=False)),
                    _number(site.worst_predicted_error(int8_inputs=True)),
                )
                for site in found.linear_sites
            ],
            "None.",
        ),
    ]
    return _page(f"Outliers of {of.model}", body, drawn)


def suspects_page(found: WeightSuspects) -> str:
    """The page for suspects, called so throughout."""
    body = [
        f"<h1>Suspects in {html.escape(found.model)}</h1>",
        f"<p>{html.escape(suspects_caveat())}</p>",
        _section("Layer by dimension", "heatmap", ""),
        "<h2>Suspects</h2>",
        _table(
            ("dimension", "predicted score", "layers", "of", "in layers"),
            [
                (
                    _whole(suspect.dimension),
                    _number(suspect.score),
                    _whole(len(suspect.layers)),
                    _whole(suspect.layer_count),
                    ranges(suspect.layers),
                )
                for suspect in found.suspects
            ],
            "None.",
        ),
    ]
    return _page(f"Suspects in {found.model}", body, {"heatmap": charts.suspects_heatmap(found)})


def _page(title: str, body: Sequence[str], drawn: dict[str, Any]) -> str:
    vl_convert: Any = importlib.import_module("vl_convert")  # its stubs want an argument that it does not need

    specs = json.dumps({name: chart.to_dict() for name, chart in drawn.items()})
    return _PAGE.format(
        title=html.escape(title),
        style=_STYLE,
        body="\n".join(body),
        library=_safe(vl_convert.javascript_bundle()),
        specs=_safe(specs),
        script=_SCRIPT,
    )


def _safe(script: str) -> str:
    """Script text in which nothing can end the element that it stands in."""
    return re.sub(r"</(?=script)", r"<\\/", script, flags=re.IGNORECASE).replace("<!--", "<\\!--")


def _section(title: str, chart: str, note: str) -> str:
    shown = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f'<h2>{html.escape(title)}</h2>{shown}<div class="chart" id="{chart}"></div>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[Cell]], otherwise: str) -> str:
    rows = list(rows)
    if not rows:
        return f'<p class="note">{html.escape(otherwise)}</p>'
    numeric = [isinstance(cell, tuple) for cell in rows[0]]
    head = "".join(
        f'<th{" class=n" if is_number else ""}><button type="button">{html.escape(name)}</button></th>'
        for name, is_number in zip(heads, numeric, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    if isinstance(cell, tuple):
        return f'<td class="n" data-value="{cell[0]!r}">{html.escape(cell[1])}</td>'
    return f"<td>{html.escape(cell)}</td>"


def _whole(value: int) -> Cell:
    return float(value), str(value)


def _number(value: float) -> Cell:
    return value, f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(value: float) -> Cell:
    return value, f"{value:.2%}"
