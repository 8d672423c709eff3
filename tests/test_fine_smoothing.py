"""convert --smooth fine: what is written is the source times scales in steps of 2^(1/4), rounded once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.calibration_models import make_model, some_text
from support.checkpoints import read_all, read_tensors
from support.program import tree
from support.smoothing import planted, smoothed_statistics, spread
from support.verifying import verified
from test_smoothed_conversion import SMALL, Notes, StopError, Stops, from_transformers, logits, saved_like, weights
from torch import Tensor
from typer.testing import CliRunner

from int8cli import ConvertOptions, DequantizeOptions, InspectOptions, convert, dequantize, inspect_outliers, load_model
from int8cli.checkpoint.locate import opened_source
from int8cli.cli import app
from int8cli.cli.convert_options import complete_smooth
from int8cli.cli.optional_value import SMOOTH
from int8cli.commands.options import LayoutName
from int8cli.errors import (
    CannotRunError,
    CannotRunInPartsError,
    CheckpointError,
    InexactSmoothingError,
    OptionError,
    SettingsMismatchError,
    StatisticsFileError,
    StatisticsMismatchError,
)
from int8cli.evaluation.columns import ChosenColumns, columns_from, smoothing_from
from int8cli.evaluation.evaluate import evaluate
from int8cli.evaluation.methods import chosen_methods
from int8cli.evaluation.options import EvaluationRun
from int8cli.evaluation.subject import find_subject
from int8cli.llm_int8.limits import FINE_STEPS
from int8cli.llm_int8.quantize import INT8_MAX, quantize_rowwise
from int8cli.llm_int8.scales import QUARTERS
from int8cli.model.sampling import Sampling
from int8cli.outliers.statistics_file import save_statistics
from int8cli.outliers.unit_smoothing import proving
from int8cli.planning.blocks import Rectangle
from int8cli.planning.exponents import TensorExponents, gathered, tensor_of
from int8cli.progress import SILENT

COLUMNS, ROWS = ".smooth_quarter_exponents", ".smooth_row_quarter_exponents"
# Families, with the share of their int8 layers that is smoothed at least.
FAMILIES = {"llama-biased": 0.5, "opt": 0.5, "bloom": 0.5, "gemma2": 0.2, "mixtral": 0.2, "gpt2": 0.5}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama") / "model", spread, **SMALL)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("planted") / "model", planted)


@pytest.fixture(scope="module")
def unbroken(model: Path, words: Path) -> Path:
    return convert(model, model.parent / "unbroken", options(words)).output


@pytest.fixture(scope="module")
def statistics(model: Path, words: Path) -> Path:
    path = model.parent / "fine.safetensors"
    how = InspectOptions(text=words, tokens=48, sequence_length=16, smooth="fine", work_dir=model.parent / "work")
    save_statistics(inspect_outliers(model, how), path)  # type: ignore[arg-type]
    return path


def options(words: Path | None, layout: LayoutName = "compressed-tensors", **changes: Any) -> ConvertOptions:
    chosen: dict[str, Any] = {"outlier_columns": 2, "tokens": 48, "sequence_length": 16, "smooth": "fine", **changes}
    return ConvertOptions(layout=layout, text=words, **chosen)


def by_scale(tensor: Tensor, exponents: Tensor, dim: int) -> Tensor:
    """float64 values times s(k) or, where k is that of a row, divided by s(-k), here by another way than convert's."""
    of_rows = dim == 0
    numbers = (-exponents if of_rows else exponents).tolist()
    factors = torch.tensor([2.0 ** (number // 4) * QUARTERS[number % 4] for number in numbers], dtype=torch.float64)
    factors = factors[:, None] if of_rows and tensor.dim() == 2 else factors
    return tensor.double() / factors if of_rows else tensor.double() * factors


def smoothed_source(source: Path, output: Path, *, transposed: bool = False) -> dict[str, Tensor]:
    """The source's tensors times the recorded scales, each rounded once."""
    tensors, recorded = weights(source), read_all(output / "int8/outliers")
    wide: dict[str, Tensor] = {}
    for name, exponents in sorted(recorded.items()):  # columns first
        if not name.endswith((COLUMNS, ROWS)):
            continue
        tensor = tensor_of(name)
        before = wide.get(tensor, tensors[tensor].t() if transposed and tensors[tensor].dim() == 2 else tensors[tensor])
        wide[tensor] = by_scale(before, exponents, 0 if name.endswith(ROWS) else 1)
    for name, product in wide.items():
        found = product.to(tensors[name].dtype)
        tensors[name] = found.t() if transposed and found.dim() == 2 else found
    return tensors


def failed(output: Path, source: Path) -> list[str]:
    return [check.name for check in verified(output, source).checks if check.failures]


# What is written


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_output_is_the_source_times_scales_rounded_once(architecture: str, words: Path, tmp_path: Path) -> None:
    transposed = architecture == "gpt2"
    layout: LayoutName = "bitsandbytes" if architecture in ("gpt2", "opt") else "compressed-tensors"
    source = make_model(architecture, tmp_path / "model", spread, **SMALL)
    report = convert(source, tmp_path / "out", options(words, layout)).report
    assert report.settings["smooth"] == "fine"
    assert report.smoothing is not None
    assert report.smoothing.steps == FINE_STEPS
    assert report.smoothing.smoothed >= FAMILIES[architecture] * report.smoothing.layers
    expected, written = smoothed_source(source, tmp_path / "out", transposed=transposed), weights(tmp_path / "out")
    changed = 0
    for name, tensor in expected.items():
        if written[name].dtype == torch.int8:
            data, absmax = quantize_rowwise(tensor.t() if transposed else tensor)
            stored = written[name.replace("weight", "SCB") if layout == "bitsandbytes" else f"{name}_scale"]
            assert torch.equal(written[name], data), name
            assert torch.equal(stored.reshape(-1), absmax if layout == "bitsandbytes" else absmax / INT8_MAX)
        else:
            changed += not torch.equal(tensor, weights(source)[name])
            assert torch.equal(written[name], tensor), name
    assert bool(changed) == (architecture != "gemma2")  # whose gains of 1 + w take no division
    exact = logits(from_transformers(source)).double()
    smoothed = logits(from_transformers(saved_like(source, tmp_path / "smoothed", expected))).double()
    assert float((smoothed - exact).norm() / exact.norm()) < 0.15  # weights that amplify every rounding
    check = next(check for check in verified(tmp_path / "out", source).checks if check.name == "weights")
    assert "times their scales" in check.detail
    assert (f", of which {changed} stay floats, each value the nearest" in check.detail) == bool(changed)
    assert failed(tmp_path / "out", source) == []


def test_vectors_that_finer_scales_would_take_digits_of_are_scaled_less(words: Path, tmp_path: Path) -> None:
    """Biases of 1e-5 are not normal in float16: times 2^(1/4) they would be rounded by more than their last digit."""

    def shrink(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("layer_norm.bias"):
                parameter.copy_(torch.linspace(-1e-5, 1e-5, len(parameter)))
        spread(model)

    source = make_model("opt", tmp_path / "model", shrink, dtype=torch.float16, **SMALL)
    convert(source, tmp_path / "out", options(words))
    assert failed(tmp_path / "out", source) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_dtype(dtype: torch.dtype, words: Path, tmp_path: Path) -> None:
    source = make_model("llama-biased", tmp_path / "model", spread, dtype=dtype, **SMALL)
    convert(source, tmp_path / "out", options(words))
    expected, written = smoothed_source(source, tmp_path / "out"), weights(tmp_path / "out")
    norms = {name: each for name, each in expected.items() if written[name].dtype != torch.int8}
    assert all(torch.equal(written[name], each) for name, each in norms.items())
    assert failed(tmp_path / "out", source) == []


def test_stored_columns_are_those_of_the_smoothed_weight(model: Path, unbroken: Path) -> None:
    expected, stored = smoothed_source(model, unbroken), read_all(unbroken / "int8/outliers")
    layers = [name.removesuffix(".outlier_cols") for name in stored if name.endswith(".outlier_cols")]
    assert len(layers) == 14
    for layer in layers:
        columns = stored[f"{layer}.outlier_cols"].long()
        assert torch.equal(stored[f"{layer}.outlier_weight"], expected[f"{layer}.weight"][:, columns])


def test_the_report_and_the_card_say_what_it_costs(unbroken: Path) -> None:
    card = (unbroken / "README.md").read_text()
    assert "in steps of 2^(1/4)" in card
    assert "within 0.4 %" in card
    assert "X.smooth_quarter_exponents" in card
    assert "computes the same bits as the original" not in card
    shown = CliRunner().invoke(app, ["report", str(unbroken)])
    assert "in steps of 2^(1/4), which rounds norms" in shown.output
    assert json.loads((unbroken / "int8/report.json").read_text())["smoothing"]["steps"] == 4


# The choice and its proof


def test_a_fold_is_proved_by_powers_of_two_that_leave_no_scaled_column_out() -> None:
    fine = torch.tensor([0, 1, -1, 2, 3, -6, 9, -56, 56]).to(torch.int8)
    found = proving(fine, FINE_STEPS).tolist()
    assert found == [0, 1, -1, 1, 1, -2, 2, -14, 14]


def test_finer_scales_lose_less(outliers: Path, words: Path, tmp_path: Path) -> None:
    exact = logits(from_transformers(outliers)).float()
    errors = []
    for smooth in ("fine", "none"):
        changes: dict[str, Any] = {"outliers": "none", "text": None} if smooth == "none" else {}
        convert(outliers, tmp_path / smooth, replace(options(words, smooth=smooth, outlier_columns=0), **changes))
        errors.append(float((logits(from_transformers(tmp_path / smooth)).float() - exact).norm()))
    assert errors[0] < errors[1] / 2
    predicted = {}
    for steps in (1, 4):
        sites = [site.once_smoothed() for site in smoothed_statistics(outliers, smooth_steps=steps).linear_sites]
        predicted[steps] = sum(site.predicted_error(each, int8_inputs=True) for site in sites for each in site.linears)
    assert predicted[4] < predicted[1]


# Readers


def test_dequantize_undoes_it_but_for_the_rounding(model: Path, unbroken: Path, tmp_path: Path) -> None:
    dequantize(unbroken, tmp_path / "floats", DequantizeOptions())
    restored, stored = weights(tmp_path / "floats"), read_all(unbroken / "int8/outliers")
    eps = torch.finfo(torch.bfloat16).eps
    for name, tensor in weights(model).items():
        found = restored[name]
        columns = stored.get(name.replace("weight", "outlier_cols"))
        if columns is not None:
            tensor, found = tensor[:, columns.long()], found[:, columns.long()]
        apart = (found.double() - tensor.double()).abs()
        assert bool((apart <= eps * tensor.double().abs()).all()), name


def test_load_model_runs_it(outliers: Path, words: Path, tmp_path: Path) -> None:
    convert(outliers, tmp_path / "out", options(words))
    convert(outliers, tmp_path / "plain", options(None, smooth="none", outlier_columns=None, outliers="none"))
    exact = logits(from_transformers(outliers)).float()
    found = [logits(load_model(tmp_path / name, inputs="absmax")).float() for name in ("out", "plain")]
    assert float((found[0] - exact).norm()) < float((found[1] - exact).norm()) / 2


def test_evaluate_says_of_the_conversion_what_it_promised_of_the_model(
    model: Path, unbroken: Path, tmp_path: Path
) -> None:
    """But for the rounding of gains, which one has and the other leaves out."""
    statistics = smoothed_statistics(model, stored_columns=2, smooth_steps=FINE_STEPS)
    chosen = columns_from(statistics, 2)
    columns = ChosenColumns(chosen.by_layer, chosen.provenance, smoothing=smoothing_from(statistics, 2))
    pairs = {"smoothed-vector-wise": "vector-wise", "smoothed-stored": "zeropoint-llm-int8-stored"}
    run = EvaluationRun(chosen_methods([*pairs]), Sampling(48, 16))
    text = some_text(200, seed=1)
    with opened_source(str(model), revision=None, download_dir=tmp_path / "incoming") as source:
        promised = evaluate(find_subject(source, None), text, columns, run, SILENT)
        with opened_source(str(unbroken), revision=None, download_dir=tmp_path / "incoming") as converted:
            run = replace(run, methods=chosen_methods(list(pairs.values())))
            found = evaluate(find_subject(converted, source), text, None, run, SILENT)
    assert promised.smooth == "fine"
    for smoothed, plain in pairs.items():
        one, other = promised.method(smoothed), found.method(plain)
        assert one is not None
        assert other is not None
        assert one.mean_error == pytest.approx(other.mean_error, rel=0.1)
        assert one.scores is not None
        assert other.scores is not None
        assert one.scores.nats == pytest.approx(other.scores.nats, rel=0.01)


def test_the_command_evaluates_by_finer_scales(outliers: Path, words: Path, tmp_path: Path) -> None:
    how = ["--text", str(words), "--tokens", "32", "--sequence-length", "16", "--work-dir", str(tmp_path)]
    how += ["--methods", "smoothed-vector-wise"]
    for smooth, said in (("fine", "in steps of 2^(1/4), norms rounded"), ("exact", "by powers of two, exactly")):
        found = CliRunner().invoke(app, ["evaluate", str(outliers), *how, "--smooth", smooth])
        assert found.exit_code == 0, found.output
        assert f"smoothed methods: {said}" in found.output


# Options


def test_exact_is_what_auto_does(model: Path, words: Path, tmp_path: Path) -> None:
    for smooth in ("exact", "auto"):
        convert(model, tmp_path / smooth, options(words, smooth=smooth))
    assert tree(tmp_path / "exact") == tree(tmp_path / "auto")


def test_statistics_smooth_as_they_were_made(model: Path, statistics: Path, unbroken: Path, tmp_path: Path) -> None:
    chosen = options(None, smooth=str(statistics))
    report = convert(model, tmp_path / "out", chosen).report
    assert report.settings["smooth"] == "fine"
    by_file = weights(tmp_path / "out")
    assert all(torch.equal(each, by_file[name]) for name, each in weights(unbroken).items())
    assert failed(tmp_path / "out", model) == []
    named = options(None, outliers=str(statistics), smooth="fine")
    assert tree(convert(model, tmp_path / "named", named).output) == tree(tmp_path / "out")
    with pytest.raises(StatisticsMismatchError, match="exact smoothing is asked for"):
        convert(model, tmp_path / "other", options(None, outliers=str(statistics), smooth="exact"))


def test_statistics_without_smoothing_do_not_smooth_on_demand(model: Path, words: Path, tmp_path: Path) -> None:
    how = InspectOptions(text=words, tokens=48, sequence_length=16, work_dir=tmp_path / "work")
    save_statistics(inspect_outliers(model, how), tmp_path / "plain.safetensors")  # type: ignore[arg-type]
    for smooth in ("exact", "fine"):
        with pytest.raises(StatisticsMismatchError, match="nothing that smooths"):
            convert(model, tmp_path / "out", options(None, outliers=str(tmp_path / "plain.safetensors"), smooth=smooth))


@pytest.mark.parametrize("smooth", ["auto", "exact", "fine"])
def test_a_part_cannot_run_the_model_to_smooth(smooth: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotRunInPartsError):
        convert(model, tmp_path / "out", options(None, smooth=smooth, outlier_columns=0, part=(1, 2)))


def test_parts_write_what_one_run_writes(model: Path, statistics: Path, tmp_path: Path) -> None:
    chosen = options(None, smooth=str(statistics))
    convert(model, tmp_path / "one", chosen)
    for part in (2, 1):
        convert(model, tmp_path / "parts", replace(chosen, part=(part, 2)))
    assert tree(tmp_path / "parts") == tree(tmp_path / "one")


def test_a_file_of_both_kinds_is_refused(model: Path, tmp_path: Path) -> None:
    found = smoothed_statistics(model)
    sites = list(found.sites)
    place = next(place for place, site in enumerate(sites) if site.smoothing is not None)
    smoothing = sites[place].smoothing
    assert smoothing is not None
    sites[place] = replace(sites[place], smoothing=replace(smoothing, steps=FINE_STEPS))
    save_statistics(replace(found, sites=tuple(sites)), tmp_path / "mixed.safetensors")
    with pytest.raises(StatisticsFileError, match="mixes powers of two with finer scales"):
        convert(model, tmp_path / "out", options(None, smooth=str(tmp_path / "mixed.safetensors")))


@pytest.mark.parametrize("smooth", ["exact", "fine"])
def test_what_is_named_is_done_or_refused(smooth: str, model: Path, words: Path, tmp_path: Path) -> None:
    """Only `auto` does without."""
    for outliers in ("none", "weights"):
        with pytest.raises(OptionError, match="needs a run of the model"):
            convert(model, tmp_path / "out", options(None, smooth=smooth, outliers=outliers))
    bare = tmp_path / "bare"
    saved_like(model, bare, weights(model))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    with pytest.raises(CannotRunError, match="no tokenizer"):
        convert(bare, tmp_path / "out", options(words, smooth=smooth))
    notes = Notes()
    assert convert(bare, tmp_path / "auto", options(words, smooth="auto"), progress=notes).report.smoothing is None
    assert any("without smoothing" in note for note in notes.said)


def test_inspect_outliers_takes_the_scales_as_a_value(
    model: Path, words: Path, statistics: Path, tmp_path: Path
) -> None:
    file = tmp_path / "found.safetensors"
    how = ["--text", str(words), "--tokens", "48", "--sequence-length", "16", "--work-dir", str(tmp_path / "work")]
    found = CliRunner().invoke(app, ["inspect-outliers", str(model), *how, "--smooth", "fine", "-o", str(file)])
    assert found.exit_code == 0, found.output
    assert "inputs can be smoothed in steps of 2^(1/4)" in found.output
    assert file.read_bytes() == statistics.read_bytes()


def test_a_value_after_smooth_is_one_only_if_it_names_scales() -> None:
    for words, completed in (
        ("--smooth", "--smooth=exact"),
        ("--smooth model -o x", "--smooth=exact model -o x"),
        ("model --smooth fine", "model --smooth fine"),
        ("--smooth=fine model", "--smooth=fine model"),
        ("-- --smooth", "-- --smooth"),
    ):
        assert list(SMOOTH.completed(words.split())) == completed.split()


def test_completion_knows_both() -> None:
    assert {"exact", "fine"} <= set(complete_smooth(""))
    assert next(iter(complete_smooth("fi"))) == "fine"


# Interruptions and damage


def test_an_interrupted_run_goes_on_to_the_same_bytes(model: Path, words: Path, unbroken: Path, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        convert(model, tmp_path / "out", options(words), progress=Stops(4))
    with pytest.raises(SettingsMismatchError, match="smooth"):
        convert(model, tmp_path / "out", options(words, smooth="exact"))
    convert(model, tmp_path / "out", options(words, smooth=None))  # the default resumes what began
    assert tree(tmp_path / "out") == tree(unbroken)


def test_several_workers_and_threads_write_the_same_bytes(
    model: Path, words: Path, unbroken: Path, tmp_path: Path
) -> None:
    convert(model, tmp_path / "out", options(words, workers=2, threads=2))
    assert tree(tmp_path / "out") == tree(unbroken)


def test_verify_does_not_trust_how_convert_rounds(
    model: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where convert rounds towards zero, converting again finds the same bytes: verify asks what is nearest too."""
    from int8cli.conversion import scaling

    def cut(values: Tensor, steps: Any, **how: Any) -> Tensor:
        found = rounded(values, steps, **how)
        if values.shape[1] == 1:  # a vector
            beyond = (found.double() * scaling.scales(-how["rows"], steps)[:, None]).abs() > values.double().abs()
            found.view(torch.int16).sub_(beyond.to(torch.int16))
        return found

    rounded = scaling.scaled
    monkeypatch.setattr(scaling, "scaled", cut)
    monkeypatch.setattr(scaling, "_loses", lambda before, *_: torch.zeros_like(before, dtype=torch.bool))
    convert(model, tmp_path / "out", options(words))
    found = {check.name: check.failures for check in verified(tmp_path / "out", model).checks if check.failures}
    assert list(found) == ["weights"]
    assert all("is not the nearest" in failure.problem for failure in found["weights"])


def test_a_changed_norm_is_found(model: Path, words: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", options(words))
    name = "model.layers.0.input_layernorm.weight"
    file = next(path for path in (tmp_path / "out").glob("*.safetensors") if name in read_tensors(path))
    tensors = read_tensors(file)
    tensors[name].view(torch.int16)[3] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    found = {check.name: check.failures for check in verified(tmp_path / "out", model).checks if check.failures}
    assert any(failure.tensor == name for failure in found["weights"])


def test_exponents_of_one_tensor_in_two_units_are_refused() -> None:
    with pytest.raises(ValueError, match="different steps"):
        gathered([("a.smooth_exponents", b"\x01"), ("a.weight.smooth_row_quarter_exponents", b"\x01")])
    assert gathered([("a.smooth_exponents", b"\x01")]) == {"a.weight": TensorExponents(columns=b"\x01")}


def test_damaged_exponents_are_found(model: Path, words: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", options(words))
    files = sorted((tmp_path / "out/int8/outliers").iterdir())
    file = next(path for path in files if any(name.endswith((COLUMNS, ROWS)) for name in read_tensors(path)))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="exponents"):
        dequantize(tmp_path / "out", tmp_path / "floats", DequantizeOptions())


def test_a_value_that_loses_more_than_its_last_digit_is_refused() -> None:
    from int8cli.conversion.scaling import BlockScaling

    scaling = BlockScaling({"norm": TensorExponents(rows=bytes([256 - 9, 9]), steps=FINE_STEPS)}, "cpu")
    kept = scaling.scaled_vector("norm", Rectangle(0, 1, 0, 2), torch.tensor([[0.75, float("nan")]]).half())
    assert float(kept[0, 0]) == pytest.approx(0.75 / 2**2.25, rel=1e-3)
    for values in ([3 * 2.0**-24, 1.0], [1.0, 60000.0]):
        with pytest.raises(InexactSmoothingError, match="the scale of its column"):
            scaling.scaled_vector("norm", Rectangle(0, 1, 0, 2), torch.tensor([values]).half())
