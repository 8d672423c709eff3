"""The page and pictures of an evaluation: complete, self-contained, and working in a browser."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support.browser import WATCHING, needs_browser, seen_at, seen_by
from test_charts import markup

from int8cli.errors import MissingExtraError, OutputError
from int8cli.report.evaluation_charts import agreement_by_method, perplexity_by_method
from int8cli.report.evaluation_page import evaluation_page, verdict_lines, write_evaluation
from int8cli.report.layer_charts import errors_by_layer
from int8cli.report.layer_roles import OUTSIDE, LayerPlace, places
from int8cli.results.evaluation import (
    REFERENCE,
    EvaluatedText,
    Evaluation,
    LayerError,
    MethodResult,
    Scores,
    StoredColumnsSummary,
)

# Nats over 16 bit: one method is off by orders of magnitude, one is better by chance.
OVER = {"absmax by tensor": 8.25, "vector-wise": 0.0625, "int8 weights": -0.004}
KEYS = {"absmax by tensor": "absmax-tensor", "vector-wise": "vector-wise", "int8 weights": "int8-weights"}
LAYERS = 3


def layer_errors(scale: float) -> tuple[LayerError, ...]:
    linears = (("attn.qkv", "norm-fed"), ("mlp.down", "second feed-forward"))
    return tuple(
        LayerError(f"h.{block}.{name}", kind, "h", block, scale * (1 + block + 4 * place))
        for block in range(LAYERS)
        for place, (name, kind) in enumerate(linears)
    )


def made_up(name: str = "some/model", *, predicts: bool = True) -> Evaluation:
    """Three methods beside 16 bit, over three blocks of two linear layers."""
    methods = [MethodResult(REFERENCE, "16 bit", Scores(3.0, (2.9, 3.1)) if predicts else None, ())]
    for place, (label, over) in enumerate(OVER.items()):
        divergence = abs(over) + 0.001
        scores = Scores(3.0 + over, (2.9 + over, 3.1 + over), over, 0.01, divergence, 1 / (1 + divergence))
        methods.append(MethodResult(KEYS[label], label, scores if predicts else None, layer_errors(0.1 / 10**place)))
    text = EvaluatedText("a text", "0" * 64, 64, 2, 32, 0, 62 if predicts else 0)
    columns = StoredColumnsSummary(8, "another text", "1" * 64, 64, 7.5)
    return Evaluation(
        name, None, False, name, "bfloat16", text, 6.0, columns, 6, 64, tuple(methods), ("Be careful.",), 1.0
    )


def changed(found: Evaluation, of: str, **fields: Any) -> Evaluation:
    methods = tuple(dataclasses.replace(method, **fields) if method.label == of else method for method in found.methods)
    return dataclasses.replace(found, methods=methods)


def loaded(found: Evaluation) -> Evaluation:
    """The same with two methods under the names of those that loaders compute."""
    names = {"vector-wise": "bitsandbytes", "int8 weights": "zeropoint-llm-int8-stored"}
    for label, key in names.items():
        found = changed(found, label, key=key)
    return found


def test_the_page_starts_with_what_loaders_compute() -> None:
    page = markup(evaluation_page(loaded(made_up())))
    first, second, third = re.findall(r'<p class="verdict">(.*?)</p>', page)
    assert first == "Perplexity 20.09 in 16 bit."
    assert second.startswith("In load_model: int8 weights: perplexity 20.01 (-0.004 ± 0.01 nats)")
    assert third.startswith("In transformers and bitsandbytes: vector-wise: perplexity 21.38 (+0.062 ± 0.01 nats)")
    assert re.findall(r"<tr class=yours><td>(.*?)</td>", page) == ["vector-wise", "int8 weights"]
    assert "some/model: 6 linear layers in int8" in page
    assert "Note: Be careful." in page


def test_a_method_that_no_loader_computes_is_called_that() -> None:
    lines = verdict_lines(made_up())
    assert lines[1].startswith("Closest to 16 bit of the methods that were compared: int8 weights: perplexity 20.01")
    assert lines[2] == "None of them is what transformers with bitsandbytes or load_model compute."
    assert "class=yours" not in evaluation_page(made_up())


def test_of_a_compressed_tensors_output_the_vector_wise_row_is_marked() -> None:
    converted = dataclasses.replace(made_up(), converted=True)
    assert "In vLLM, or transformers and compressed-tensors: vector-wise: " in " ".join(verdict_lines(converted))


def test_the_page_contains_every_method_and_the_errors_of_every_layer() -> None:
    methods, layers = re.findall(r"<tbody>(.*?)</tbody>", markup(evaluation_page(made_up())), re.DOTALL)
    assert re.findall(r"<tr><td>(.*?)</td>", methods) == ["16 bit", *OVER]
    assert f'data-value="{math.exp(11.25)!r}">7.69e+04<' in methods
    assert re.findall(r"<tr><td>(.*?)</td>", layers) == [error.name for error in layer_errors(1.0)]
    row = next(row for row in re.findall(r"<tr>.*?</tr>", layers) if "h.2.mlp.down" in row)
    shown = [float(value) for value in re.findall(r'data-value="(.*?)"', row)]
    assert shown == [layer_errors(scale)[5].error for scale in (0.1, 0.1 / 10, 0.1 / 100)]


def test_the_page_fetches_nothing() -> None:
    page = markup(evaluation_page(made_up()))
    tags = re.findall(r"<(?:script|link|img|iframe|object|source)\b[^>]*>", page)
    assert tags == ['<link rel="icon" href="data:,">', "<script>", "<script>"]
    assert not re.search(r"@import|url\(|https?:", page)


def test_no_name_can_break_out_of_the_page() -> None:
    evil = "</script><script>alert(1)</script>"
    found = made_up(evil)
    layer = LayerError(evil, evil, None, None, 0.5)
    for label in OVER:
        found = changed(found, label, layers=(layer,))
    found = changed(found, "vector-wise", label=evil)
    assert "<script>alert" not in evaluation_page(found)


def test_a_very_bad_method_does_not_squeeze_the_others_in_the_chart() -> None:
    """On the axis that is drawn, linear near 0 and logarithmic from there, 0.06 nats are a third of the way to 8."""
    spec = perplexity_by_method(made_up()).to_dict()
    scale = spec["layer"][2]["encoding"]["x"]["scale"]
    assert scale["type"] == "symlog"

    def place(value: float) -> float:
        return math.copysign(math.log1p(abs(value) / scale["constant"]), value)

    low, high = map(place, scale["domain"])
    shown = [(place(value) - low) / (high - low) for value in (-0.014, 0.0, 0.0625, 8.26)]
    assert shown == sorted(shown)
    assert shown[0] > 0.02
    assert shown[3] < 0.98
    assert shown[2] - shown[1] > 0.2
    assert shown[3] - shown[2] > 0.2


def test_bars_are_one_standard_error_to_each_side() -> None:
    bars = {row["method"]: row for row in perplexity_by_method(made_up()).to_dict()["layer"][1]["data"]["values"]}
    assert set(bars) == set(OVER)
    assert (bars["vector-wise"]["low"], bars["vector-wise"]["high"]) == (0.0525, 0.0725)


def test_non_finite_values_are_shown_as_text_only() -> None:
    scores = Scores(math.nan, (math.nan, math.nan), math.nan, math.nan, math.nan, 0.0)
    found = changed(made_up(), "absmax by tensor", scores=scores, layers=layer_errors(math.nan))
    rows = {row["method"]: row for row in perplexity_by_method(found).to_dict()["layer"][2]["data"]["values"]}
    assert rows["absmax by tensor"] == {"method": "absmax by tensor", "value": None, "text": "not finite"}
    page = evaluation_page(found)
    assert "NaN" not in json.dumps([chart(found).to_dict() for chart in (errors_by_layer, agreement_by_method)])
    assert 'data-value="Infinity">not finite<' in page


def test_without_the_16_bit_model_there_are_only_perplexities() -> None:
    methods = tuple(
        dataclasses.replace(method, scores=Scores(3.0, (3.0,)), layers=()) for method in made_up().methods[2:]
    )
    found = dataclasses.replace(made_up(), methods=methods, reference=None, converted=True)
    page = markup(evaluation_page(found))
    assert re.findall(r'class="chart" id="(.*?)"', page) == ["perplexity"]
    assert perplexity_by_method(found).to_dict()["layer"][0]["encoding"]["x"]["scale"]["type"] == "log"


def test_an_encoder_has_errors_only() -> None:
    found = made_up(predicts=False)
    page = markup(evaluation_page(found))
    assert re.findall(r'class="chart" id="(.*?)"', page) == ["errors"]
    assert "erplexity" not in page
    assert verdict_lines(found)[0] == (
        "Closest to 16 bit of the methods that were compared: int8 weights: mean output error of the layers 0.4 %."
    )


def drawn_panels(found: Evaluation) -> list[dict[str, Any]]:
    """Title and rows of each panel: altair keeps data of all layers, or of all panels, where they are the same."""
    whole = errors_by_layer(found).to_dict()
    shared = whole.get("data")
    return [{"title": panel["title"]["text"], "rows": panel.get("data", shared)["values"]} for panel in whole["concat"]]


def test_each_panel_shows_the_errors_of_all_methods_for_one_role() -> None:
    panels = drawn_panels(made_up())
    assert [panel["title"] for panel in panels] == ["attn.qkv", "mlp.down"]
    found = {(row["layer"], row["method"]): row["value"] for row in panels[1]["rows"]}
    assert len(found) == LAYERS * len(OVER)
    assert found["h.2.mlp.down", "vector-wise"] == 0.07


def test_experts_share_a_place_and_the_worst_is_drawn() -> None:
    layers = tuple(LayerError(f"h.0.experts.{n}.up", "norm-fed", "h", 0, 0.1 * (1 + n % 3)) for n in range(4))
    found = made_up()
    for label in OVER:
        found = changed(found, label, layers=layers)
    [panel] = drawn_panels(found)
    assert [row["layer"] for row in panel["rows"]] == ["h.0.experts.2.up, the worst of 4"] * len(OVER)


def test_stacks_are_distinguished_and_layers_outside_are_counted() -> None:
    layers = [
        LayerError("encoder.block.1.layer.0.q", "", "encoder.block", 1, 0.1),
        LayerError("decoder.block.1.layer.0.q", "", "decoder.block", 1, 0.1),
        LayerError("pooler.dense", "", None, None, 0.1),
        LayerError("project.in", "", None, None, 0.1),
    ]
    assert places(layers) == [
        LayerPlace("encoder.block: layer.*.q", 1),
        LayerPlace("decoder.block: layer.*.q", 1),
        LayerPlace(OUTSIDE, 0),
        LayerPlace(OUTSIDE, 1),
    ]


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<svg ")])
def test_pictures_are_written(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"evaluation{suffix}"
    write_evaluation(made_up(), path)
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_the_picture_has_the_legend_with_every_shape(tmp_path: Path) -> None:
    write_evaluation(made_up(), tmp_path / "evaluation.svg")
    picture = (tmp_path / "evaluation.svg").read_text()
    assert "Symbol legend" in picture
    assert "shape" in "".join(re.findall(r'aria-label="Symbol legend[^"]*"', picture))


def test_another_suffix_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="html"):
        write_evaluation(made_up(), tmp_path / "report.pdf")
    assert not list(tmp_path.iterdir())


def test_missing_altair_is_named_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(MissingExtraError) as caught:
        write_evaluation(made_up(), tmp_path / "report.html")
    assert "int8cli[plots]" in caught.value.hint
    assert not list(tmp_path.iterdir())


PROBE = f"""
<script>{WATCHING}
hoverOver('#errors path[aria-label*="h.2.mlp.down"][aria-label*="vector-wise"]', () => {{
  seen.legend = document.querySelectorAll('#errors .role-legend-symbol path').length;
  const table = document.querySelector('.scroll table');
  const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
  const button = table.querySelectorAll('th button')[2];
  button.click(); seen.down = names();
  button.click(); seen.up = names();
  const symbol = document.querySelector('#errors .role-legend-symbol path');
  for (const event of ['pointerdown', 'mousedown', 'pointerup', 'mouseup', 'click']) {{
    symbol.dispatchEvent(new MouseEvent(event, middleOf(symbol)));
  }}
  setTimeout(() => {{
    const dots = [...document.querySelectorAll('#errors path[aria-label*="input:"]')];
    const left = dots.filter(dot => Number(dot.getAttribute('opacity')) > 0.5);
    seen.left = left.map(dot => dot.getAttribute('aria-label'));
    tell();
  }}, 200);
}});
</script>
"""


@needs_browser
def test_in_a_browser_the_page_has_no_error_and_a_point_shows_its_layer(tmp_path: Path) -> None:
    write_evaluation(made_up(), tmp_path / "report.html")
    seen = seen_by(PROBE, tmp_path / "report.html")
    assert seen["errors"] == []
    assert seen["charts"] == [1, 1, 1]
    assert seen["legend"] == len(OVER)
    for part in ("h.2.mlp.down", "vector-wise", "0.07"):
        assert part in seen["tooltip"]
    assert len(seen["left"]) == 2 * LAYERS  # of all panels, after a click on the first name in the legend
    assert all("absmax by tensor" in dot for dot in seen["left"])
    # The 16-bit model has no difference and sorts as the least.
    assert seen["down"] == ["absmax by tensor", "vector-wise", "int8 weights", "16 bit"]
    assert seen["up"] == ["16 bit", "int8 weights", "vector-wise", "absmax by tensor"]


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (800, True), (1600, False)])
def test_in_a_browser_the_page_fits_its_width(tmp_path: Path, width: int, dark: bool) -> None:
    write_evaluation(loaded(made_up()), tmp_path / "report.html")
    seen = seen_at(width, tmp_path / "report.html", dark=dark)
    assert seen["page"] <= width
    assert set(seen["charts"]) == {"perplexity", "agreement", "errors"}
    for drawn, room in seen["charts"].values():
        assert room - 12 <= drawn <= room <= width
    assert seen["tables"]["Methods"][:3] == ["method", "perplexity", "Δ nats"]
