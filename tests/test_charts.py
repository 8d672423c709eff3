"""The page and pictures of the report: complete, self-contained, and working in a browser."""

import re
from pathlib import Path

import pytest
import torch
from support.browser import WATCHING, needs_browser, seen_at, seen_by

from int8cli.errors import OutputError
from int8cli.llm_int8.inputs import InputStatistics
from int8cli.outliers.statistics import (
    NORM_FED,
    RESIDUAL,
    SECOND_FEED_FORWARD,
    LinearStatistics,
    OutlierStatistics,
    Provenance,
    SiteStatistics,
)
from int8cli.report.outlier_charts import heatmap, write_picture
from int8cli.report.outlier_page import statistics_page, write_page
from int8cli.report.vega import COLD, HOT, ON_DARK, DoublingSteps

LAYERS = 3


def made_up(name: str = "some/model") -> OutlierStatistics:
    """Three layers with an outlier feature in dimension 11, and a massive activation in the residual's dimension 7."""
    generator = torch.Generator().manual_seed(0)
    sites = []
    for layer in range(LAYERS):
        kinds = ((NORM_FED, "attn.qkv", 64), (SECOND_FEED_FORWARD, "mlp.down", 96), (RESIDUAL, "", 64))
        for kind, linear, width in kinds:
            x = torch.randn((1, 40, width), generator=generator)
            if kind == NORM_FED:
                x[:, :, 11] = -12.5 - layer
            elif kind == RESIDUAL:
                x[:, 0, 7] = 9000.0
            statistics = InputStatistics(width)
            statistics.update(x)
            path = f"h.{layer}.{linear}".rstrip(".")
            linears = (LinearStatistics(path, 8, width, torch.full((width,), 1e-4), 6.0, 50.0),) if linear else ()
            sites.append(SiteStatistics(path, kind, "h", layer, statistics.summary(), linears))
    of = Provenance(name, None, "", "a text", "0" * 64, 40, 40, 0, "bfloat16", 6.0)
    return OutlierStatistics(of, tuple(sites))


def test_the_heatmap_has_a_cell_for_each_layer_and_dimension_with_its_value() -> None:
    cells = heatmap(made_up()).to_dict()["data"]["values"]
    assert len(cells) == LAYERS * 48
    found = {(cell["layer"], cell["dimension"]): cell for cell in cells}
    assert found[2, 11]["value"] == 14.5
    assert found[2, 11]["maximum"] == -14.5
    assert found[2, 11]["share"] == 1.0
    assert found[2, 11]["site"] == "h.2.attn.qkv"


def markup(page: str) -> str:
    """The page without the content of its scripts, and without the places where long names may be broken."""
    return re.sub(r"(<script>).*?(</script>)", r"\1\2", page, flags=re.DOTALL).replace("<wbr>", "")


def test_the_page_fetches_nothing() -> None:
    page = statistics_page(made_up())
    tags = re.findall(r"<(?:script|link|img|iframe|object|source)\b[^>]*>", markup(page))
    assert tags == ['<link rel="icon" href="data:,">', "<script>", "<script>"]
    assert not re.search(r"@import|url\(|https?:", markup(page))


def test_the_page_names_the_outliers() -> None:
    page = statistics_page(made_up())
    assert "1 systematic outlier feature: 11" in page
    assert "1 massive activation, the largest 9,000" in page
    assert markup(page).count("<table>") == 3


def test_a_models_name_cannot_break_out_of_the_page() -> None:
    page = statistics_page(made_up("</script><script>alert(1)</script>"))
    assert "<script>alert" not in page


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<svg ")])
def test_pictures_are_written(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"heatmap{suffix}"
    write_picture(made_up(), path)
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_the_svg_names_the_outlier(tmp_path: Path) -> None:
    write_picture(made_up(), tmp_path / "heatmap.svg")
    labels = re.findall(r'aria-label="dimension: 11; layer: 2; [^"]*"', (tmp_path / "heatmap.svg").read_text())
    assert len(labels) == 1
    assert "14.5" in labels[0]


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_picture(made_up(), tmp_path / "file" / "heatmap.png")


PROBE = f"""
<script>{WATCHING}
hoverOver('#heatmap [aria-label^="dimension: 11; layer: 2;"]', () => {{
  const table = [...document.querySelectorAll('.scroll table')].at(-1);
  const layers = () => [...table.tBodies[0].rows].map(row => Number(row.cells[2].textContent));
  const button = table.querySelectorAll('th button')[2];
  button.click(); seen.down = layers();
  button.click(); seen.up = layers();
  tell();
}});
</script>
"""


@needs_browser
def test_in_a_browser_the_page_has_no_error_and_a_cell_shows_its_value(tmp_path: Path) -> None:
    write_page(made_up(), tmp_path / "report.html")
    seen = seen_by(PROBE, tmp_path / "report.html")
    assert seen["errors"] == []
    assert seen["charts"] == [1, 1, 1, 1]
    for told in ("layer", "2", "dimension", "11", "14.5", "h.2.attn.qkv"):
        assert told in seen["tooltip"]
    assert seen["down"] == [2, 2, 1, 1, 0, 0]
    assert seen["up"] == [0, 0, 1, 1, 2, 2]


def test_one_large_value_does_not_make_all_others_look_alike() -> None:
    steps = DoublingSteps(6.0)
    assert steps.bounds == [1.5, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0]
    assert len(steps.names) == len({*COLD, *HOT})
    assert [steps.name_of(value) for value in (0.0, 5.9, 6.0, 9000.0)] == [
        *("under 1.5", "3 to 6", "6 to 12", "96 or more")
    ]
    found = made_up()
    found.sites[0].inputs.maximum[5] = 9000.0
    shown = {(cell["layer"], cell["dimension"]): cell["step"] for cell in heatmap(found).to_dict()["data"]["values"]}
    assert (shown[0, 5], shown[2, 11]) == ("96 or more", "12 to 24")
    assert len(set(shown.values())) > 3


def test_every_term_of_the_page_is_explained_on_it() -> None:
    page = markup(statistics_page(made_up()))
    for explained in ("Norm-fed inputs are", "A massive activation is", "An outlier feature is", "Dims over: "):
        assert explained in page


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, True), (800, False), (1600, True)])
def test_in_a_browser_the_page_fits_its_width(tmp_path: Path, width: int, dark: bool) -> None:
    write_page(made_up(), tmp_path / "report.html")
    seen = seen_at(width, tmp_path / "report.html", dark=dark)
    assert seen["page"] <= width
    assert set(seen["charts"]) == {"heatmap", "features", "magnitudes", "errors"}
    for drawn, room in seen["charts"].values():
        assert room - 12 <= drawn <= room <= width
    colors = {ON_DARK[color] if dark else color for color in (*COLD, *HOT)}
    assert set(seen["fills"]) <= colors
    assert len(seen["fills"]) > 3
