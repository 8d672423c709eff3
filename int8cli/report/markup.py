"""A self-contained HTML page: charts by Vega, which is part of the page, and sortable tables.

Owns the page's markup, style and script, in light and dark, and that names from a checkpoint appear only as text. Does
not know what is reported.
"""

import html
import importlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from int8cli.report.text import printable
from int8cli.report.vega import printable_spec

_STYLE = """
:root { color-scheme: light dark; --text: #1d2430; --page: #fff; --note: #5a6372; --line: #c9d0da; --head: #3c4554;
        --stripe: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e7ee; --page: #14171c; --note: #9aa4b2; --line: #454d5a; --head: #c3cad5; --stripe: #1b1f26; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0 auto;
       max-width: 1020px; padding: 24px 20px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 36px 0 6px; }
p { margin: 4px 0; overflow-wrap: anywhere; } .note { color: var(--note); } .chart { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; margin-top: 8px; }
th, td { padding: 3px 12px 3px 0; text-align: left; white-space: nowrap; }
td.n, th.n { text-align: right; }
th { border-bottom: 1px solid var(--line); color: var(--head); background: var(--page); position: sticky; top: 0;
     white-space: normal; vertical-align: bottom; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #2a78d6; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
tbody tr:nth-child(even) { background: var(--stripe); } .scroll { overflow: auto; max-height: 560px; }
"""
# Charts set no colors for text, axes and background. These follow the reader's color scheme.
_SCRIPT = """
const ink = '#c3cad5', dark = matchMedia('(prefers-color-scheme: dark)');
const onDark = {
  style: {'guide-label': {fill: ink}, 'guide-title': {fill: ink}, 'group-title': {fill: ink}},
  title: {color: '#e3e7ee', subtitleColor: ink}, header: {labelColor: ink, titleColor: ink},
  axis: {domainColor: '#5d6675', gridColor: '#2b313a', tickColor: '#5d6675'}, text: {color: ink}, rule: {color: ink},
};
function draw() {
  const config = {background: 'transparent', ...(dark.matches ? onDark : {})};
  for (const [id, spec] of Object.entries(charts)) {
    vegaEmbed('#' + id, spec, {actions: false, renderer: 'svg', config, tooltip: dark.matches ? {theme: 'dark'} : {}});
  }
}
draw();
dark.addEventListener('change', draw);
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
NOTHING: Cell = (-math.inf, "")  # in a column of numbers


def page(title: str, body: Sequence[str], drawn: Mapping[str, Any]) -> str:
    """The page. `body` is HTML; `drawn` are altair charts by the names of their sections."""
    vl_convert: Any = importlib.import_module("vl_convert")  # its stubs require an argument that is optional

    specs = {name: printable_spec(chart) for name, chart in drawn.items()}
    return _PAGE.format(
        title=escape(title),
        style=_STYLE,
        body="\n".join(body),
        library=_safe(vl_convert.javascript_bundle()),
        specs=_json_in_script(specs),
        script=_SCRIPT,
    )


def escape(text: str) -> str:
    """The text for an element or a quoted attribute: printable, and without markup."""
    return html.escape(printable(text))


def _json_in_script(value: Any) -> str:
    """JSON for a script element. In JSON, `<` occurs only in strings."""
    return json.dumps(value).replace("<", "\\u003c")


def _safe(script: str) -> str:
    """Script text that cannot close its own element."""
    return re.sub(r"</(?=script)", r"<\\/", script, flags=re.IGNORECASE).replace("<!--", "<\\!--")


def section(title: str, chart: str, note: str) -> str:
    """A heading, a note if it is not empty, and the place for the chart with that name."""
    shown = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<h2>{escape(title)}</h2>{shown}<div class="chart" id="{chart}"></div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[Cell]], otherwise: str) -> str:
    """A table that sorts by a click on a heading; without rows, the sentence `otherwise`.

    The cells of the first row determine which columns are numbers.
    """
    rows = list(rows)
    if not rows:
        return f'<p class="note">{escape(otherwise)}</p>'
    numeric = [isinstance(cell, tuple) for cell in rows[0]]
    head = "".join(
        f'<th{" class=n" if is_number else ""}><button type="button">{escape(name)}</button></th>'
        for name, is_number in zip(heads, numeric, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    if isinstance(cell, tuple):
        return f'<td class="n" data-value="{_sortable(cell[0])}">{escape(cell[1])}</td>'
    return f"<td>{escape(cell)}</td>"


def _sortable(value: float) -> str:
    """A number in JavaScript's notation. NaN is sorted as the largest."""
    return repr(value) if math.isfinite(value) else "-Infinity" if value == -math.inf else "Infinity"


def whole(value: int) -> Cell:
    return float(value), str(value)


def number(value: float) -> Cell:
    return value, f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def share(value: float) -> Cell:
    return value, f"{value:.2%}"
