"""The smoothed methods of `evaluate`: what they promise of a smoothed model is what such a model computes."""

import json
from pathlib import Path

import pytest
from support.calibration_models import make_model, some_text
from support.smoothing import planted, smoothed_copy, smoothed_statistics, spread
from typer.testing import CliRunner, Result

from int8cli import ConvertOptions, convert
from int8cli.checkpoint.locate import opened_source
from int8cli.cli import app
from int8cli.commands.evaluate_job import smoothed_for
from int8cli.evaluation.columns import ChosenColumns, SmoothedColumns, columns_from, smoothing_from
from int8cli.evaluation.evaluate import evaluate
from int8cli.evaluation.methods import chosen_methods
from int8cli.evaluation.options import EvaluationRun, applicable
from int8cli.evaluation.subject import find_subject
from int8cli.model.sampling import Sampling
from int8cli.outliers.statistics_file import save_statistics
from int8cli.progress import SILENT
from int8cli.results.evaluation import Evaluation

SAMPLING = Sampling(48, 16)
TEXT = some_text(200, seed=1)
PAIRS = {
    "smoothed-vector-wise": "vector-wise",
    "smoothed-zeropoint": "zeropoint-vector-wise",
    "smoothed-zeropoint-inputs": "zeropoint-inputs",
    "smoothed-bitsandbytes": "bitsandbytes",
    "smoothed-int8-weights": "int8-weights",
    "smoothed-stored": "zeropoint-llm-int8-stored",
}


def evaluated(model: Path, methods: list[str], columns: ChosenColumns | None) -> Evaluation:
    with opened_source(str(model), revision=None, download_dir=model / "incoming") as source:
        run = EvaluationRun(chosen_methods(methods), SAMPLING)
        return evaluate(find_subject(source, None), TEXT, columns, run, SILENT)


def kl(found: Evaluation, key: str) -> float:
    method = found.method(key)
    assert method is not None
    assert method.scores is not None
    assert method.scores.kl_divergence is not None
    return method.scores.kl_divergence


pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_smoothed_method_computes_what_the_plain_one_does_in_the_smoothed_model(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", spread)
    statistics = smoothed_statistics(model, stored_columns=2)
    smoothed_copy(model, tmp_path / "smoothed", statistics, False)
    chosen = columns_from(statistics, 2)
    smoothing = smoothing_from(statistics)
    columns = ChosenColumns(chosen.by_layer, chosen.provenance, smoothing=smoothing)
    stored = {name: each.stored for name, each in smoothing.items()}
    promised = evaluated(model, list(PAIRS), columns)
    found = evaluated(
        tmp_path / "smoothed", list(PAIRS.values()), ChosenColumns({**chosen.by_layer, **stored}, chosen.provenance)
    )
    for smoothed, plain in PAIRS.items():
        assert kl(promised, smoothed) == kl(found, plain), smoothed


def test_without_exponents_for_a_layer_it_is_left_alone(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", spread)
    chosen = columns_from(smoothed_statistics(model), 2)
    nothing: dict[str, SmoothedColumns] = {}
    found = evaluated(
        model, [*PAIRS, *PAIRS.values()], ChosenColumns(chosen.by_layer, chosen.provenance, smoothing=nothing)
    )
    for smoothed, plain in PAIRS.items():
        assert kl(found, smoothed) == kl(found, plain), smoothed


def test_smoothing_helps_a_model_with_planted_outliers(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", planted)
    chosen = columns_from(statistics := smoothed_statistics(model), 0)
    columns = ChosenColumns(chosen.by_layer, chosen.provenance, smoothing=smoothing_from(statistics))
    found = evaluated(model, ["vector-wise", "smoothed-vector-wise"], columns)
    assert kl(found, "smoothed-vector-wise") < kl(found, "vector-wise") / 3


def run_command(model: Path, work: Path, *arguments: str) -> Result:
    text = work / "words.txt"
    text.write_text(TEXT.text)
    options = ["--text", str(text), "--tokens", "32", "--sequence-length", "16", "--work-dir", str(work)]
    return CliRunner().invoke(app, ["evaluate", str(model), *options, *arguments])


def test_the_command_calibrates_and_smooths(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", planted)
    result = run_command(model, tmp_path, "--methods", "vector-wise,smoothed-vector-wise", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    keys = [method["key"] for method in json.loads(result.stdout)["methods"]]
    assert keys == ["16-bit", "vector-wise", "smoothed-vector-wise"]


def test_statistics_of_a_file_do_not_smooth(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", planted)
    save_statistics(smoothed_statistics(model), tmp_path / "found.safetensors")
    result = run_command(
        model, tmp_path, "--methods", "smoothed-vector-wise", "--outliers", str(tmp_path / "found.safetensors")
    )
    assert result.exit_code == 2
    assert "need a calibration of their own" in result.output


def test_a_converted_model_has_no_smoothed_rows(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", planted)
    convert(model, tmp_path / "int8", ConvertOptions(outliers="none"))
    with (
        opened_source(str(tmp_path / "int8"), revision=None, download_dir=tmp_path / "incoming") as source,
        opened_source(str(model), revision=None, download_dir=tmp_path / "incoming") as reference,
    ):
        found = applicable(find_subject(source, reference), chosen_methods(["bitsandbytes", *PAIRS]))
    assert [method.key for method in found.methods] == ["16-bit", "bitsandbytes"]
    assert any("smoothed methods are left out" in note for note in found.notes)


@pytest.mark.parametrize(
    ("methods", "scheme"),
    [
        (["smoothed-int8-weights"], None),
        (["int8-weights", "smoothed-int8-weights"], None),
        (["smoothed-int8-weights", "smoothed-vector-wise"], "zeropoint"),
        (["smoothed-stored"], "zeropoint"),
    ],
)
def test_exponents_are_chosen_for_the_product_that_is_asked_for(methods: list[str], scheme: str | None) -> None:
    assert smoothed_for(chosen_methods(methods)) == scheme
