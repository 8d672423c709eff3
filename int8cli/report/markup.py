"""A self-contained HTML page: charts by Vega, which is part of the page, and sortable tables.

Owns the page's markup, style and script, in light and dark, and that names from a checkpoint appear only as text. Does
not know what is reported.
"""

import html
import importlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from int8cli.report.text import printable
from int8cli.report.vega import ON_DARK, printable_spec
from int8cli.results.units import human_bytes, percent

_STYLE = """
:root { color-scheme: light dark; --text: #1d2430; --page: #fff; --note: #5a6372; --line: #c9d0da; --head: #3c4554;
        --stripe: #f6f8fa; --yours: #e7f0fb; --accent: #2a78d6; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e7ee; --page: #14171c; --note: #9aa4b2; --line: #454d5a; --head: #c3cad5; --stripe: #1b1f26;
          --yours: #1c3048; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0 auto;
       max-width: 1600px; padding: 24px clamp(12px, 3vw, 48px) 64px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 36px 0 6px; }
p { margin: 4px 0; max-width: 78ch; overflow-wrap: anywhere; } .note { color: var(--note); }
.verdict { border-left: 4px solid var(--accent); padding-left: 12px; margin: 12px 0; font-size: 17px; }
.chart { width: 100%; overflow: hidden; min-height: 40px; } .chart svg { display: block; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: 3px 14px 3px 4px; text-align: left; vertical-align: top; }
td:not(.n) { overflow-wrap: break-word; min-width: 8em; }
td.n, th.n { text-align: right; } td.n { white-space: nowrap; }
th { border-bottom: 1px solid var(--line); color: var(--head); background: var(--page); position: sticky; top: 0;
     white-space: normal; vertical-align: bottom; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
tbody tr:nth-child(even) { background: var(--stripe); }
tbody tr.yours { background: var(--yours); font-weight: 600; }
.scroll { position: relative; overflow: auto; max-height: 560px; width: fit-content; max-width: 100%; margin-top: 8px;
          scrollbar-gutter: stable; padding-right: 4px; }
@media (max-width: 600px) {
  table { font-size: 12px; } th, td { padding-right: 8px; } .verdict { font-size: 16px; }
  td:first-child, th:first-child { position: sticky; left: 0; background: inherit; min-width: 7em; max-width: 40vw; }
  tbody tr { background: var(--page); } th:first-child { background: var(--page); z-index: 1; }
}
@media print { .scroll { max-height: none; overflow: visible; } }
"""
# Charts set no colors for text, axes and background. These follow the reader's color scheme, and so do the colors that
# are named in ON_DARK. A chart is drawn, measured, and drawn again with panels that fill the page's width.
_SCRIPT = """
const ink = '#c3cad5', dark = matchMedia('(prefers-color-scheme: dark)');
const darkConfig = {
  style: {'guide-label': {fill: ink}, 'guide-title': {fill: ink}, 'group-title': {fill: ink}},
  title: {color: '#e3e7ee', subtitleColor: ink}, header: {labelColor: ink, titleColor: ink},
  axis: {domainColor: '#5d6675', gridColor: '#2b313a', tickColor: '#5d6675'}, text: {color: ink}, rule: {color: ink},
};
const LEAST_PANEL = 330, LEGEND_ENTRY = 215, SHORT_ENTRY = 100, CHARACTER = 6.6, BOLD_CHARACTER = 8.2, TRIES = 4;
const repainted = value => typeof value === 'string' ? onDark[value] ?? value
  : Array.isArray(value) ? value.map(repainted)
  : value && typeof value === 'object' ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, repainted(v)]))
  : value;
function inLines(text, width, character = CHARACTER) {
  const lines = [];
  for (const word of [text].flat().join(' ').split(' ')) {
    const longer = lines.length ? lines.at(-1) + ' ' + word : word;
    if (lines.length && longer.length * character <= width) lines[lines.length - 1] = longer; else lines.push(word);
  }
  return lines;
}
function wrapTitle(owner, width) {
  const title = owner?.title;
  if (typeof title === 'string' || Array.isArray(title)) owner.title = inLines(title, width);
  else if (title && typeof title === 'object') {
    for (const part of ['text', 'subtitle']) if (title[part]) {
      title[part] = inLines(title[part], width, part === 'text' ? BOLD_CHARACTER : CHARACTER);
    }
  }
}
function visit(value, act) {
  if (!value || typeof value !== 'object') return;
  act(value);
  Object.values(value).forEach(each => visit(each, act));
}
function panelsOf(spec) {
  return spec.vconcat ? spec.vconcat.flatMap(panelsOf) : spec.concat ? spec.concat.flatMap(panelsOf) : [spec];
}
function arranged(original, room, width) {
  const spec = structuredClone(original);
  if (spec.hconcat) { spec.concat = spec.hconcat; delete spec.hconcat; spec.columns ??= spec.concat.length; }
  const most = Math.max(1, Math.floor(room / LEAST_PANEL));
  const columns = spec.concat ? Math.min(most, spec.concat.length, Math.max(spec.columns ?? 2, 1)) : 1;
  if (spec.concat) spec.columns = columns;
  width ??= room / columns - 90;
  if (spec.concat || spec.vconcat) wrapTitle(spec, room);
  for (const panel of panelsOf(spec)) {
    panel.width = Math.max(90, Math.floor(width));
    wrapTitle(panel, panel.width + 40);
    visit(panel, inside => { if (inside.x?.title) wrapTitle(inside.x, panel.width + 20); });
  }
  visit(spec, inside => {
    if (inside.legend?.orient === 'top' && inside.legend.columns) {
      const entry = inside.legend.columns > 4 ? SHORT_ENTRY : LEGEND_ENTRY;
      inside.legend.columns = Math.max(1, Math.min(inside.legend.columns, Math.floor(room / entry)));
    }
  });
  return {spec: dark.matches ? repainted(spec) : spec, columns, width: panelsOf(spec)[0].width};
}
const drawn = {};
let turn = 0;
async function drawOne(id, original, mine) {
  const place = document.getElementById(id), room = place.clientWidth;
  let width;
  for (let attempt = 0; attempt < TRIES && mine === turn; attempt++) {
    const {spec, columns, width: panel} = arranged(original, room, width);
    drawn[id]?.finalize();
    const config = {background: 'transparent', ...(dark.matches ? darkConfig : {})};
    const tooltip = dark.matches ? {theme: 'dark'} : {};
    drawn[id] = await vegaEmbed(place, spec, {actions: false, renderer: 'svg', config, tooltip});
    const over = place.querySelector('svg').getBoundingClientRect().width - room;
    if (over > -4 && over <= 0 || over > 0 && panel <= 90) break;
    width = panel - Math.ceil((over + 1) / columns);
  }
}
async function draw() {
  const mine = ++turn;
  for (const [id, spec] of Object.entries(charts)) if (mine === turn) await drawOne(id, spec, mine);
  if (mine === turn) document.body.dataset.drawn = innerWidth;
}
draw();
dark.addEventListener('change', draw);
let waiting, last = innerWidth;
addEventListener('resize', () => {
  if (innerWidth === last) return;
  last = innerWidth; clearTimeout(waiting); waiting = setTimeout(draw, 150);
});
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
<main>
{body}
</main>
<script>{library}</script>
<script>const charts = {specs}, onDark = {dark};{script}</script>
</body>
</html>
"""

_PART_OF_NAME = re.compile(r"\.(?=[\w*])")  # a long name may be broken here, and nowhere else
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
        dark=_json_in_script(ON_DARK),
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


def section(title: str, chart: str, note: str, read: str = "") -> str:
    """A heading, a note if it is not empty, and the place for the chart with that name.

    `read` is what a screen reader says instead of the chart's marks.
    """
    shown = f'<p class="note">{escape(note)}</p>' if note else ""
    label = escape(read or f"Chart: {title}. The tables of this page have its figures.")
    # Vega sets role and label of the place itself, so these are one element further out.
    place = f'<div role="img" aria-label="{label}"><div class="chart" id="{chart}"></div></div>'
    return f"<h2>{escape(title)}</h2>{shown}{place}"


def heading(title: str, note: str = "") -> str:
    """A heading above a table, and a note if it is not empty."""
    return f"<h2>{escape(title)}</h2>" + (f'<p class="note">{escape(note)}</p>' if note else "")


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    otherwise: str,
    *,
    name: str = "",
    marked: Collection[int] = (),
) -> str:
    """A table that sorts by a click on a heading; without rows, the sentence `otherwise`.

    The cells of the first row determine which columns are numbers. `name` is what a screen reader calls the table;
    rows whose number is in `marked` stand out.
    """
    rows = list(rows)
    if not rows:
        return f'<p class="note">{escape(otherwise)}</p>'
    numeric = [isinstance(cell, tuple) for cell in rows[0]]
    head = "".join(
        f'<th scope="col"{" class=n" if is_number else ""}><button type="button">{escape(name)}</button></th>'
        for name, is_number in zip(heads, numeric, strict=True)
    )
    body = "".join(
        f"<tr{' class=yours' if place in marked else ''}>{''.join(map(_cell, row))}</tr>"
        for place, row in enumerate(rows)
    )
    label = escape(name or heads[0])
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{label}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, tuple):
        return f'<td class="n" data-value="{_sortable(cell[0])}">{escape(cell[1])}</td>'
    return f"<td>{_PART_OF_NAME.sub('.<wbr>', escape(cell))}</td>"


def _sortable(value: float) -> str:
    """A number in JavaScript's notation. NaN is sorted as the largest."""
    return repr(value) if math.isfinite(value) else "-Infinity" if value == -math.inf else "Infinity"


def whole(value: int) -> Cell:
    return float(value), str(value)


def number(value: float | None) -> Cell:
    """Three significant digits."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return value, "not finite"
    return value, f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def share(value: float | None) -> Cell:
    """A share as a percentage with two digits."""
    return NOTHING if value is None else (value, percent(value))


def size(count: int) -> Cell:
    return float(count), human_bytes(count)
