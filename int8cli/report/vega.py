"""What all charts share: access to altair, their look, and PNG and SVG files by vl-convert, without a browser.

Owns the look of every chart. Does not know about the data.
"""

import io
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from int8cli.checkpoint.writer import write_file
from int8cli.errors import MissingExtraError, OutputError
from int8cli.report.text import printable

Row = dict[str, Any]

# Each color of a chart that does not fit a dark page, and what a dark page shows instead.
PAPER = "#ffffff"  # gaps between cells
COLD = ("#eef3fa", "#c3d7ef", "#7fabdf")  # small values
HOT = ("#f6b48f", "#e57f5a", "#cb4335", "#9b1c1c", "#5f0b0b")  # large ones, each twice the one before
ON_DARK = {
    PAPER: "#14171c",
    **dict(zip(COLD, ("#1b2430", "#25425f", "#3d6ea3"), strict=True)),
    **dict(zip(HOT, ("#8a4a32", "#c0603c", "#e98a4e", "#f8bd77", "#fdebc4"), strict=True)),
}


def require_altair() -> Any:
    """The altair module. Raises MissingExtraError if altair or vl-convert is not installed."""
    try:
        import altair
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"charts need {error.name}, which is not installed", hint="pip install 'int8cli[plots]'."
        ) from error
    # Embed all rows, however many. The reports limit their number.
    altair.data_transformers.disable_max_rows()
    return altair


# Viewers of an SVG may show text in a wider font than that in which vl-convert measures it: room for long labels.
_PADDING = {"left": 40, "right": 24, "top": 5, "bottom": 5}


def save_chart(chart: Any, path: Path) -> None:
    """Write a chart as .png or .svg on white, whole or not at all. Raises OutputError."""
    framed = chart.properties(background="white", padding=_PADDING)
    chart = require_altair().Chart.from_dict(printable_spec(framed))
    if path.suffix == ".svg":
        text = io.StringIO()
        chart.save(text, format="svg")
        write_file(path, text.getvalue().encode())
    elif path.suffix == ".png":
        data = io.BytesIO()
        chart.save(data, format="png", scale_factor=2)
        write_file(path, data.getvalue())
    else:
        raise OutputError(f"{path}: pictures are .png or .svg")


def printable_spec(chart: Any) -> dict[str, Any]:
    """The chart as Vega-Lite, with all text made printable, because XML cannot contain control characters."""
    return {key: _printable(value) for key, value in chart.to_dict().items()}


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {_printable(key): _printable(each) for key, each in value.items()}
    return [_printable(each) for each in value] if isinstance(value, list) else value


def chart_of(rows: Sequence[Row]) -> Any:
    return require_altair().Chart(require_altair().Data(values=list(rows)))


def stacked(charts: Sequence[Any], otherwise: str) -> Any:
    """The charts one below the other, each with its own colors and shapes; without charts, the text `otherwise`."""
    alt = require_altair()
    if not charts:
        charts = [chart_of([{"text": otherwise}]).mark_text().encode(text="text:N")]
    if len(charts) == 1:
        return finished(charts[0])
    return finished(alt.vconcat(*charts).resolve_scale(color="independent", shape="independent"))


def finished(chart: Any) -> Any:
    """The chart with the common look: no frame, the reader's font, text and background in the page's color scheme."""
    return chart.configure(font="system-ui, sans-serif", view=require_altair().ViewConfig(strokeWidth=0))


@dataclass(frozen=True, slots=True)
class DoublingSteps:
    """Colors for magnitudes, in steps that double: one large value does not make the others look alike.

    Values below `first_hot` are blue; from there on they are red.
    """

    first_hot: float

    @property
    def bounds(self) -> list[float]:
        first = self.first_hot / 2 ** (len(COLD) - 1)
        return [float(f"{first * 2**step:.3g}") for step in range(len(COLD) + len(HOT) - 1)]

    @property
    def names(self) -> list[str]:
        bounds = self.bounds
        between = [f"{low:g} to {high:g}" for low, high in pairwise(bounds)]
        return [f"under {bounds[0]:g}", *between, f"{bounds[-1]:g} or more"]

    def name_of(self, value: float) -> str:
        return self.names[bisect_right(self.bounds, value)]

    def scale(self) -> Any:
        return require_altair().Scale(domain=self.names, range=[*COLD, *HOT])


# Ticks between powers of ten, for ranges up to a factor.
_LOG_STEPS = ((6, (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)), (30, (1.0, 2.0, 5.0)), (1000, (1.0, 3.0)))


def logarithmic(values: Sequence[float], room: float) -> dict[str, Any]:
    """A logarithmic scale for the values, with a margin of the factor `room` at both ends.

    Ticks are at powers of ten, and between them if the range is small: the smaller, the more.
    """
    alt = require_altair()
    low, high = min(values, default=1.0) / room, max(values, default=1.0) * room
    steps = next((steps for most, steps in _LOG_STEPS if high <= most * low), (1.0,))
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = [float(f"{step:g}e{power}") for power in decades for step in steps]
    axis = alt.Axis(values=[tick for tick in ticks if low <= tick <= high], format="~g")
    return {"scale": alt.Scale(type="log", domain=[low, high], nice=False), "axis": axis}


def short(value: float) -> float:
    """The value with five significant digits: enough for a tooltip, and the page stays small."""
    return float(f"{value:.5g}")
