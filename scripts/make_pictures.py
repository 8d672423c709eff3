"""Make the pictures of README.md and docs/ again, in docs/images/.

    python scripts/make_pictures.py                         all pictures
    python scripts/make_pictures.py recording benchmark     only these

`recording` records a conversion of the demo model. `evaluation` and `outliers` are pictures of that model that the
commands write themselves. `benchmark` draws the figures of docs/benchmarks.json. `make demo` makes the demo model.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recording import record, to_svg
from slim_svg import slimmed

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
FIGURES = ROOT / "docs" / "benchmarks.json"
MODEL = "demo/SmolLM2-135M-Instruct"
CONVERTED = f"{MODEL}-int8"
PROGRAM = Path(sys.executable).with_name("int8cli")
LIMIT_S = 3600


def draw_recording(path: Path) -> None:
    """A complete conversion of the demo model."""
    shutil.rmtree(ROOT / CONVERTED, ignore_errors=True)
    command = ["int8cli", "convert", MODEL, "--output", CONVERTED]
    lines = record([str(PROGRAM), *command[1:]], ROOT, LIMIT_S)
    path.write_text(to_svg(" ".join(command), lines), encoding="utf-8")


def draw_evaluation(path: Path) -> None:
    """Perplexity by method and output error by layer, with the default text and tokens of evaluate."""
    _run("evaluate", MODEL, "--quiet", "--output", path)
    path.write_text(slimmed(path.read_text(encoding="utf-8")), encoding="utf-8")


def draw_outliers(path: Path) -> None:
    """Outlier features by layer, as a heatmap."""
    _run("inspect-outliers", MODEL, "--quiet", "--output", path)
    path.write_text(slimmed(path.read_text(encoding="utf-8")), encoding="utf-8")


def draw_benchmark(path: Path) -> None:
    """Time and peak memory of each converter, as bars."""
    import altair as alt

    from int8cli.report.vega import finished, save_chart

    figures = json.loads(FIGURES.read_text())
    peers = figures["peers"]
    panels = [
        _bars(peers["runs"], "seconds", "seconds, start of the process included", ",.1f"),
        _bars(peers["runs"], "peak_memory_mb", "peak memory, MB", ",.0f"),
    ]
    title = alt.TitleParams(
        f"Converting {peers['what'].split(';')[0]}", subtitle=f"{figures['machine']}; {figures['date']}", anchor="start"
    )
    save_chart(finished(alt.vconcat(*panels).properties(title=title)), path)


def _bars(runs: list[Mapping[str, Any]], figure: str, title: str, form: str) -> Any:
    """A panel with one bar for each converter, in the order of the file, labelled with its figure."""
    import altair as alt

    rows = [
        {"name": f"{run['name']}, {run['options']}", "value": run[figure], "ours": run["ours"], "place": place}
        for place, run in enumerate(runs)
    ]
    axis = alt.Axis(title=None, labelLimit=400, ticks=False, domain=False, labelPadding=8)
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("value:Q", title=title),
        y=alt.Y("name:N", sort=alt.SortField("place"), axis=axis),
    )
    color = alt.condition("datum.ours", alt.value("#1f77b4"), alt.value("#b8bcc2"))
    bars = base.mark_bar(height=15).encode(color=color)
    figures = base.mark_text(align="left", dx=4).encode(text=alt.Text("value:Q", format=form))
    return (bars + figures).properties(width=430, height=alt.Step(22))


def _run(*arguments: str | Path) -> None:
    subprocess.run([PROGRAM, *map(str, arguments)], cwd=ROOT, timeout=LIMIT_S, check=True)


PICTURES: Mapping[str, Callable[[Path], None]] = {
    "benchmark": draw_benchmark,
    "recording": draw_recording,
    "outliers": draw_outliers,
    "evaluation": draw_evaluation,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=f"{', '.join(PICTURES)}; all of them by default")
    wanted = parser.parse_args().pictures or list(PICTURES)
    if unknown := sorted(set(wanted) - set(PICTURES)):
        parser.error(f"there is no picture {', '.join(unknown)}")
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        path = IMAGES / f"{name}.svg"
        PICTURES[name](path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
