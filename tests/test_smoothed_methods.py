"""The smoothed methods of `evaluate`: what they promise of a smoothed model is what such a model computes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.calibration_models import make_model, some_text
from support.smoothing import change_exponents, planted, smoothed_copy, smoothed_statistics, spread
from typer.testing import CliRunner, Result

import int8cli
from int8cli import ConvertOptions, EvaluateOptions, convert
from int8cli.checkpoint.locate import opened_source
from int8cli.cli import app
from int8cli.commands.evaluate_job import smoothed_for
from int8cli.commands.options import ScalesName
from int8cli.errors import StatisticsFileError, StatisticsMismatchError
from int8cli.evaluation.columns import ChosenColumns, SmoothedColumns, columns_from, smoothing_from
from int8cli.evaluation.evaluate import evaluate
from int8cli.evaluation.methods import chosen_methods
from int8cli.evaluation.options import EvaluationRun, applicable
from int8cli.evaluation.subject import find_subject
from int8cli.model.sampling import Sampling
from int8cli.outliers.statistics_file import save_statistics
from int8cli.progress import SILENT, SilentProgress
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


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_smoothed_method_computes_what_the_plain_one_does_in_the_smoothed_model(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", spread)
    statistics = smoothed_statistics(model, stored_columns=2)
    smoothed_copy(model, tmp_path / "smoothed", statistics, False)
    chosen = columns_from(statistics, 2)
    smoothing = smoothing_from(statistics, 2)
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
    columns = ChosenColumns(chosen.by_layer, chosen.provenance, smoothing=smoothing_from(statistics, 0))
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


def inspected(model: Path, file: Path, *arguments: str) -> Path:
    how = ["--work-dir", str(file.parent / "inspected"), "--output", str(file), "--quiet"]
    result = CliRunner().invoke(app, ["inspect-outliers", str(model), *how, *arguments])
    assert result.exit_code == 0, result.output
    return file


def measured(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    del document["seconds"]
    return document


@pytest.mark.parametrize("scales", ["exact", "fine"])
def test_statistics_of_a_file_give_what_a_calibration_gives(scales: ScalesName, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", planted)
    how = ["--methods", ",".join(PAIRS), "--outlier-columns", "2", "--json", "--quiet"]
    by_run = measured(run_command(model, tmp_path, *how, "--smooth", scales))
    file = inspected(model, tmp_path / "found.safetensors", "--smooth", scales)
    by_file = measured(run_command(model, tmp_path, *how, "--outliers", str(file)))
    assert by_file == by_run
    assert by_file["smooth"] == scales


def test_statistics_without_smoothing_are_refused_for_smoothed_methods(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", planted)
    file = inspected(model, tmp_path / "found.safetensors", "--tokens", "48", "--sequence-length", "16")
    for method, code in (("smoothed-vector-wise", 1), ("llm-int8-stored", 0)):
        result = run_command(model, tmp_path, "--methods", method, "--outliers", str(file))
        assert result.exit_code == code, result.output
    with pytest.raises(StatisticsMismatchError, match="what to smooth") as raised:
        int8cli.evaluate(model, file_options(tmp_path, file))
    assert "--" not in str(raised.value.hint)
    result = run_command(model, tmp_path, "--methods", "smoothed-stored", "--outliers", str(file))
    assert "inspect-outliers MODEL --output FILE.safetensors writes them; with --smooth" in " ".join(
        result.output.split()
    )


def file_options(work: Path, file: Path, **changes: Any) -> EvaluateOptions:
    """An evaluation of a smoothed method by statistics from a file."""
    (work / "words.txt").write_text(TEXT.text)
    chosen = {"text": work / "words.txt", "tokens": 32, "sequence_length": 16, "work_dir": work, "outliers": file}
    return EvaluateOptions(**{"methods": ("smoothed-vector-wise",), **chosen, **changes})


def test_other_scales_than_those_of_the_file_are_refused(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", planted)
    save_statistics(smoothed_statistics(model), file := tmp_path / "found.safetensors")
    with pytest.raises(StatisticsMismatchError, match="powers of two, and fine smoothing is asked for"):
        int8cli.evaluate(model, file_options(tmp_path, file, smooth="fine"))
    assert int8cli.evaluate(model, file_options(tmp_path, file, smooth="exact")).smooth == "exact"


def test_a_file_in_which_nothing_could_be_smoothed_leaves_all_layers_alone(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", planted)
    found = smoothed_statistics(model)
    sites = tuple(replace(site, smoothing=None, not_smoothed="no fold") for site in found.sites)
    save_statistics(replace(found, sites=sites), file := tmp_path / "found.safetensors")
    result = int8cli.evaluate(model, file_options(tmp_path, file, methods=("vector-wise", "smoothed-vector-wise")))
    assert kl(result, "smoothed-vector-wise") == kl(result, "vector-wise")


@pytest.mark.parametrize(
    ("methods", "said"),
    [(("smoothed-int8-weights",), True), (("smoothed-int8-weights", "smoothed-stored"), False)],
)
def test_exponents_of_a_file_for_another_product_are_called_so(
    methods: tuple[str, ...], said: bool, tmp_path: Path
) -> None:
    model = make_model("llama", tmp_path / "model", planted)
    save_statistics(smoothed_statistics(model), file := tmp_path / "found.safetensors")
    notes = Notes()
    int8cli.evaluate(model, file_options(tmp_path, file, methods=methods), progress=notes)
    assert any("those for int8 inputs" in note for note in notes.said) == said


def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", planted)
    save_statistics(smoothed_statistics(model), file := tmp_path / "found.safetensors")
    change_exponents(file)
    with pytest.raises(StatisticsFileError, match="contradicts itself"):
        int8cli.evaluate(model, file_options(tmp_path, file))


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
