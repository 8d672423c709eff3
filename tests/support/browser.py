"""Opens pages in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
needs_browser = pytest.mark.skipif(not _CHROMIUM, reason="needs Chromium")


_FRAME = """<!doctype html><body style="margin: 0">
<iframe src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>
const frame = document.querySelector('iframe');
const look = () => {{
  const inside = frame.contentDocument;
  if (inside?.body?.dataset.drawn !== '{width}') {{ setTimeout(look, 50); return; }}
  const charts = Object.fromEntries([...inside.querySelectorAll('.chart')].map(chart => {{
    const svg = chart.querySelector('svg').getBoundingClientRect();
    return [chart.id, [Math.round(svg.width), chart.clientWidth]];
  }}));
  const read = [...inside.querySelectorAll('h1, h2, p, [role=img], caption')].map(
    each => [each.tagName, each.getAttribute('aria-label') ?? each.textContent]);
  const fills = [...inside.querySelectorAll('.mark-rect path')].map(each => each.getAttribute('fill'));
  const tables = Object.fromEntries([...inside.querySelectorAll('.scroll')].map(box => {{
    const edge = box.getBoundingClientRect().right + 1;
    const heads = [...box.querySelectorAll('th')].filter(head => head.getBoundingClientRect().right <= edge);
    return [box.getAttribute('aria-label'), heads.map(head => head.textContent)];
  }}));
  const page = inside.documentElement.scrollWidth, paper = getComputedStyle(inside.body).backgroundColor;
  const out = document.createElement('pre');
  out.id = 'seen';
  out.textContent = JSON.stringify({{charts, read, tables, page, paper, fills: [...new Set(fills)]}});
  document.body.append(out);
}};
look();
</script>
"""


# For `seen_by`: collects the errors of a page in `seen`, hovers over a mark, and hands `seen` over at the end.
WATCHING = """
const seen = {errors: []};
window.addEventListener('error', event => seen.errors.push(event.message));
window.addEventListener('unhandledrejection', event => seen.errors.push(String(event.reason)));
const middleOf = mark => {
  const box = mark.getBoundingClientRect();
  return {bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
};
const hoverOver = (found, then) => {
  const mark = document.querySelector(found);
  if (!mark) { setTimeout(() => hoverOver(found, then), 50); return; }
  mark.dispatchEvent(new MouseEvent('mouseover', middleOf(mark)));
  mark.dispatchEvent(new PointerEvent('pointermove', middleOf(mark)));
  mark.dispatchEvent(new MouseEvent('mousemove', middleOf(mark)));
  setTimeout(() => {
    seen.tooltip = document.getElementById('vg-tooltip-element')?.innerText ?? '';
    seen.charts = [...document.querySelectorAll('.chart')].map(chart => chart.querySelectorAll('svg').length);
    then();
  }, 200);
};
const tell = () => {
  const out = document.createElement('pre');
  out.id = 'seen';
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
};
"""


def seen_at(width: int, page: Path, *, dark: bool) -> Any:
    """What a reader with a screen of this width sees, once all charts are drawn, in light or dark colors.

    `charts`: the width of each and of its place. `read`: headings, sentences, charts and tables in the order in which a
    screen reader reads them. `tables`: the heads of each that are seen before it is scrolled. `page`: the width of the
    content. `paper`: the color behind it. `fills`: those of cells.
    """
    framed = page.with_name(f"framed-{width}-{dark}.html")
    framed.write_text(_FRAME.format(page=page.as_uri(), width=width))
    return _opened(framed, ["--allow-file-access-from-files", f"--blink-settings=preferredColorScheme={int(not dark)}"])


def seen_by(probe: str, page: Path) -> Any:
    """What `probe`, HTML put at the head of the page's body, leaves as JSON in an element `seen`.

    Nothing may have been written to the browser's console.
    """
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("<body>", f"<body>{probe}", 1))
    return _opened(probed, [])


def _opened(page: Path, options: list[str]) -> Any:
    profile = page.with_name(f"profile-{page.stem}")
    result = subprocess.run(
        [
            *(_CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"),
            *("--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", *options),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert not console, "\n".join(console)
    [told] = re.findall(r'<pre id="seen">(.*?)</pre>', result.stdout, re.DOTALL)
    return json.loads(told.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
