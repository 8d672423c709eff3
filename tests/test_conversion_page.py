"""The report of a conversion: read back from disk, and as a page that works in a browser at every width."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from support.browser import needs_browser, seen_at
from support.calibration_models import make_model
from support.program import Nursery
from test_charts import markup

import int8cli
from int8cli.errors import OutputError
from int8cli.report.conversion_charts import EXACT
from int8cli.report.conversion_page import conversion_page, verdict_lines
from int8cli.report.layer_roles import OUTSIDE, LayerPlace, places_by_name
from int8cli.results.conversion import ConversionReport

LAYERS = 14  # of the tiny llama: two blocks of seven


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted")
    make_model("llama", directory / "model")
    options = int8cli.ConvertOptions(outliers="activations", tokens=64, sequence_length=32, workers=1)
    return int8cli.convert(directory / "model", directory / "out", options).output


@pytest.fixture(scope="module")
def found(converted: Path) -> ConversionReport:
    return int8cli.read_report(converted)


def test_a_report_on_disk_is_read_back_whole(converted: Path, found: ConversionReport) -> None:
    assert json.loads(json.dumps(found.to_json())) == json.loads((converted / "int8" / "report.json").read_text())
    assert len(found.layers) == LAYERS


@pytest.mark.parametrize("place", ["layers.0.kind", "layers.3.stored_columns.columns", "totals.parameters", "settings"])
def test_a_damaged_report_is_an_error_that_names_the_field(converted: Path, tmp_path: Path, place: str) -> None:
    document = json.loads((converted / "int8" / "report.json").read_text())
    *way, last = place.split(".")
    inside = document
    for part in way:
        inside = inside[int(part)] if part.isdigit() else inside[part]
    inside[last] = "nonsense" if last != "kind" else 5
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "report.json").write_text(json.dumps(document))
    with pytest.raises(OutputError, match=rf"damaged.*{last}"):
        int8cli.read_report(tmp_path)


def test_a_directory_without_a_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not a finished conversion"):
        int8cli.read_report(tmp_path)


def test_the_page_starts_with_the_verdict_in_words(found: ConversionReport) -> None:
    [verdict] = re.findall(r'<p class="verdict">(.*?)</p>', markup(conversion_page(found)))
    assert verdict == " ".join(verdict_lines(found))
    assert f"{found.source_bytes / found.output_bytes:.2f} times smaller" in verdict
    assert "The output of an average layer differs by" in verdict
    worst = max(found.layers, key=lambda layer: layer.stored.measured.with_stored)  # type: ignore[union-attr]
    assert f"in the output of {worst.name}." in verdict


def test_the_page_has_every_layer_every_kind_and_every_reason(found: ConversionReport) -> None:
    page = markup(conversion_page(found))
    tables = dict(re.findall(r"<caption>(.*?)</caption>.*?<tbody>(.*?)</tbody>", page, re.DOTALL))
    names = re.findall(r"<tr><td>(.*?)</td>", tables["Every layer in int8"])
    assert sorted(names) == sorted(layer.name for layer in found.layers)
    assert tables["Kinds of layers"].count("<tr>") == 7
    assert [group.reason in tables["Left as it was"] for group in found.left_alone] == [True] * len(found.left_alone)
    assert re.findall(r'class="chart" id="(.*?)"', page) == ["kinds", "depth", "columns"]


def test_the_page_fetches_nothing_and_no_name_breaks_out_of_it(found: ConversionReport) -> None:
    evil = "</script><script>alert(1)</script>"
    layers = (dataclasses.replace(found.layers[0], name=evil, kind=evil), *found.layers[1:])
    page = conversion_page(dataclasses.replace(found, model=evil, layers=layers, passed_over=((evil, evil),)))
    assert "<script>alert" not in page
    tags = re.findall(r"<(?:script|link|img|iframe|object|source)\b[^>]*>", markup(page))
    assert tags == ['<link rel="icon" href="data:,">', "<script>", "<script>"]
    assert not re.search(r"@import|url\(|https?:", markup(page))


def test_without_figures_and_columns_the_page_says_what_was_not_measured(found: ConversionReport) -> None:
    layers = tuple(dataclasses.replace(layer, sums=None, stored=None) for layer in found.layers)
    settings = {**found.settings, "figures": False, "outliers": "none"}
    page = markup(conversion_page(dataclasses.replace(found, layers=layers, settings=settings)))
    assert "were not measured" in page
    assert "chart" not in re.findall(r'class="(.*?)"', page)
    weights_only = tuple(dataclasses.replace(layer, stored=None) for layer in found.layers)
    page = markup(conversion_page(dataclasses.replace(found, layers=weights_only)))
    assert re.findall(r'class="chart" id="(.*?)"', page) == ["kinds", "depth"]
    assert "What that does to a layer&#x27;s output was not measured." in page


def test_a_copy_in_which_nothing_was_quantized_says_so(found: ConversionReport) -> None:
    page = markup(conversion_page(dataclasses.replace(found, layers=())))
    assert "Nothing was quantized" in page


def test_layers_have_places_by_their_names_alone() -> None:
    names = ["a.3.x.y", "b.0.experts.11.up", "b.0.experts.12.up", "head", "pool"]
    assert places_by_name(names) == [
        LayerPlace("a: x.y", 3),
        LayerPlace("b: experts.*.up", 0),
        LayerPlace("b: experts.*.up", 0),
        LayerPlace(OUTSIDE, 0),
        LayerPlace(OUTSIDE, 1),
    ]
    assert places_by_name(["h.7.q"]) == [LayerPlace("q", 7)]


def test_report_shows_tables_or_writes_files(nursery: Nursery, converted: Path, tmp_path: Path) -> None:
    shown = nursery.run("report", str(converted), cwd=tmp_path)
    assert shown.code == 0, shown.err
    assert "Output error (measured), by kind of layer" in shown.out
    as_json = nursery.run("report", str(converted), "--json", cwd=tmp_path)
    assert json.loads(as_json.out) == json.loads((converted / "int8" / "report.json").read_text())
    files = ["page.html", "picture.png", "picture.svg"]
    written = nursery.run("report", str(converted), *(part for file in files for part in ("-o", file)), cwd=tmp_path)
    assert (written.code, written.out) == (0, ""), written.err
    assert written.err.splitlines() == [f"wrote {file}" for file in files]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert nursery.run("report", "nowhere", cwd=tmp_path).code == 1
    assert nursery.run("report", str(converted), "-o", "page.pdf", cwd=tmp_path).code == 2


def test_convert_writes_the_page_that_report_writes(nursery: Nursery, tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    arguments = ("convert", "model", "-o", "out", "--outliers", "none", "--workers", "1")
    refused = nursery.run(*arguments, "--report", "page.pdf", cwd=tmp_path)
    assert (refused.code, (tmp_path / "out").exists()) == (2, False)
    assert nursery.run(*arguments, "--report", "page.html", "--dry-run", cwd=tmp_path).code == 2
    done = nursery.run(*arguments, "--report", "page.html", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "wrote page.html" in done.err
    assert (tmp_path / "page.html").read_text() == conversion_page(int8cli.read_report(tmp_path / "out"))


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, True), (800, False), (1600, True)])
def test_in_a_browser_the_page_fits_its_width(found: ConversionReport, tmp_path: Path, width: int, dark: bool) -> None:
    int8cli.write_report(found, tmp_path / "page.html")
    seen = seen_at(width, tmp_path / "page.html", dark=dark)
    assert seen["page"] <= width
    assert set(seen["charts"]) == {"kinds", "depth", "columns"}
    for drawn, room in seen["charts"].values():
        assert room - 12 <= drawn <= room <= width
    for name in ("Kinds of layers", "Every layer in int8"):
        assert seen["tables"][name][1] == EXACT, "the error that a user gets is seen before a table is scrolled"
    assert seen["paper"] == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    order = [name for name, _ in seen["read"]]
    assert order[:3] == ["H1", "P", "H2"]
    spoken = [text for _, text in seen["read"]]
    kinds = next(text for text in spoken if text.startswith("Error by kind of layer. "))
    assert "model.layers.*.mlp.down_proj: weights " in kinds
    assert spoken.index(kinds) < spoken.index("Kinds of layers") < spoken.index("Every layer in int8")
