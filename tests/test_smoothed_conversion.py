"""convert --smooth: what is written is the source times powers of two, which changes no bit of what it computes."""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.calibration_models import make_model, some_text
from support.checkpoints import read_all, read_json, read_tensors
from support.program import tree
from support.smoothing import change_exponents, planted, scale, smoothed_statistics, spread
from support.verifying import verified
from torch import Tensor
from typer.testing import CliRunner

from int8cli import ConvertOptions, DequantizeOptions, convert, dequantize, load_model, plan_conversion
from int8cli.checkpoint.locate import opened_source
from int8cli.cli import app
from int8cli.commands.options import InputsName, LayoutName
from int8cli.conversion.resumed_smoothing import require_fitting
from int8cli.conversion.scaling import BlockScaling
from int8cli.errors import (
    CheckpointError,
    InexactSmoothingError,
    OptionError,
    SavedStateError,
    SettingsMismatchError,
    StatisticsFileError,
)
from int8cli.evaluation.columns import ChosenColumns, columns_from, smoothing_from
from int8cli.evaluation.evaluate import evaluate
from int8cli.evaluation.methods import chosen_methods
from int8cli.evaluation.options import EvaluationRun
from int8cli.evaluation.subject import find_subject
from int8cli.llm_int8.limits import MAX_EXPONENT
from int8cli.llm_int8.quantize import INT8_MAX, quantize_rowwise
from int8cli.model.sampling import Sampling
from int8cli.outliers.statistics import OutlierStatistics, SiteSmoothing
from int8cli.outliers.statistics_file import save_statistics
from int8cli.planning.blocks import Rectangle
from int8cli.planning.exponents import TensorExponents
from int8cli.progress import BYTES, SILENT, SilentProgress
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore

SMALL: dict[str, Any] = {"max_shard_size": "6KB"}  # cuts every block
COLUMNS, ROWS = ".smooth_exponents", ".smooth_row_exponents"
# Families, with the share of their int8 layers that is smoothed at least. Gemma's gains of 1 + w take no division.
FAMILIES = {
    "llama-biased": 0.5,
    "mistral": 0.5,
    "stablelm": 0.5,
    "phi3": 0.5,
    "phi": 0.5,
    "opt": 0.5,
    "bloom": 0.5,
    "gpt_neox": 0.5,
    "gemma2": 0.2,
    "mixtral": 0.2,
    "gpt2": 0.5,
}


class StopError(Exception):
    """Ends a run in the middle."""


class Stops(SilentProgress):
    """Ends a conversion when it begins with its so many-th shard."""

    def __init__(self, shard: int) -> None:
        self._left = shard
        self.resumed: list[set[str]] = []

    def begin(self, task: str, parts: Mapping[str, int], *, unit: str = BYTES, finished: Collection[str] = ()) -> None:
        if task == "convert":
            self.resumed.append(set(finished))

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
        if task == "convert" and amount == 0:
            self._left -= 1
            if self._left == 0:
                raise StopError


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama") / "model", spread, **SMALL)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("planted") / "model", planted)


def options(words: Path | None, layout: LayoutName = "compressed-tensors", **changes: Any) -> ConvertOptions:
    chosen: dict[str, Any] = {"outlier_columns": 2, "tokens": 48, "sequence_length": 16, "smooth": "auto", **changes}
    return ConvertOptions(layout=layout, text=words, **chosen)


def sidecars(output: Path) -> dict[str, Tensor]:
    return read_all(output / "int8/outliers")


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: each for file in directory.glob("*.safetensors") for name, each in read_tensors(file).items()}


def smoothed_source(source: Path, output: Path, *, transposed: bool = False) -> dict[str, Tensor]:
    """The source's tensors times the recorded powers of two, here by another way than in the program."""
    tensors = weights(source)
    for name, exponents in sidecars(output).items():
        if name.endswith(ROWS):
            tensor = name.removesuffix(ROWS)
            scale(tensors, tensor, exponents, 1 if transposed and tensors[tensor].dim() == 2 else 0)
        elif name.endswith(COLUMNS):
            scale(tensors, f"{name.removesuffix(COLUMNS)}.weight", exponents, 0 if transposed else 1)
    return tensors


def logits(model: Any) -> Tensor:
    ids = torch.randint(4, 90, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def from_transformers(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def saved_like(source: Path, directory: Path, tensors: dict[str, Tensor]) -> Path:
    """A model of these tensors with the source's other files."""
    directory.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, directory)
    tensors = {name: each.contiguous() for name, each in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


# What is written


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_output_is_the_source_times_powers_of_two_and_computes_the_same_bits(
    architecture: str, words: Path, tmp_path: Path
) -> None:
    transposed = architecture == "gpt2"
    layout: LayoutName = "bitsandbytes" if transposed or architecture in ("opt", "phi3") else "compressed-tensors"
    source = make_model(architecture, tmp_path / "model", spread, **SMALL)
    report = convert(source, tmp_path / "out", options(words, layout)).report
    assert report.smoothing is not None
    assert report.smoothing.smoothed >= FAMILIES[architecture] * report.smoothing.layers
    expected, written = smoothed_source(source, tmp_path / "out", transposed=transposed), weights(tmp_path / "out")
    for name, tensor in expected.items():
        if written[name].dtype == torch.int8:
            data, absmax = quantize_rowwise(tensor.t() if transposed else tensor)
            stored = written[name.replace("weight", "SCB") if layout == "bitsandbytes" else f"{name}_scale"]
            assert torch.equal(written[name], data)
            assert torch.equal(stored.reshape(-1), absmax if layout == "bitsandbytes" else absmax / INT8_MAX)
        else:
            assert torch.equal(written[name], tensor), name
    smoothed = saved_like(source, tmp_path / "smoothed", expected)
    assert torch.equal(logits(from_transformers(source)), logits(from_transformers(smoothed)))
    assert [check.name for check in verified(tmp_path / "out", source).checks if check.failures] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
def test_every_dtype_in_both_layouts(dtype: torch.dtype, layout: LayoutName, words: Path, tmp_path: Path) -> None:
    source = make_model("llama-biased", tmp_path / "model", spread, dtype=dtype, **SMALL)
    report = convert(source, tmp_path / "out", options(words, layout)).report
    assert report.smoothing is not None
    assert report.smoothing.smoothed
    smoothed = saved_like(source, tmp_path / "smoothed", smoothed_source(source, tmp_path / "out"))
    assert torch.equal(logits(from_transformers(source)), logits(from_transformers(smoothed)))
    assert [check.name for check in verified(tmp_path / "out", source).checks if check.failures] == []


def test_a_fold_whose_tensors_are_in_different_shards(model: Path, words: Path, tmp_path: Path) -> None:
    """The same tensors as in one file, though the norm and the linears of many folds are in different files."""
    convert(model, tmp_path / "many", options(words))
    places = {name: file for file in model.glob("*.safetensors") for name in read_tensors(file)}
    parted = [
        layer["name"]
        for layer in read_json(tmp_path / "many/int8/report.json")["layers"]
        if any(places[scaled] != places[f"{layer['name']}.weight"] for scaled in layer["smoothing"]["scaled"])
    ]
    assert len(parted) > 4
    whole = saved_like(model, tmp_path / "whole", weights(model))
    convert(whole, tmp_path / "one", options(words))
    many, one = weights(tmp_path / "many"), weights(tmp_path / "one")
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)
    assert all(
        torch.equal(each, sidecars(tmp_path / "one")[name]) for name, each in sidecars(tmp_path / "many").items()
    )


def test_transformers_computes_it_with_less_error_than_unsmoothed(outliers: Path, words: Path, tmp_path: Path) -> None:
    convert(outliers, tmp_path / "out", options(words))
    convert(outliers, tmp_path / "plain", options(None, smooth="none", outlier_columns=None, outliers="none"))
    exact = logits(from_transformers(outliers)).float()
    errors = [float((logits(from_transformers(tmp_path / name)).float() - exact).norm()) for name in ("out", "plain")]
    assert errors[0] < errors[1] / 2


def test_stored_columns_are_those_of_the_smoothed_weight(model: Path, words: Path, tmp_path: Path) -> None:
    report = convert(model, tmp_path / "out", options(words)).report
    expected, stored = smoothed_source(model, tmp_path / "out"), sidecars(tmp_path / "out")
    for layer in report.layers:
        columns = stored[f"{layer.name}.outlier_cols"].tolist()
        assert len(columns) == 2
        assert layer.stored is not None
        assert layer.stored.measured is not None
        assert torch.equal(stored[f"{layer.name}.outlier_weight"], expected[f"{layer.name}.weight"][:, columns])


# Readers


def test_dequantize_undoes_it_exactly(words: Path, tmp_path: Path) -> None:
    for architecture in ("llama-biased", "gpt2"):
        source = make_model(architecture, tmp_path / architecture, spread, **SMALL)
        output = tmp_path / f"{architecture}-int8"
        report = convert(source, output, options(words, "bitsandbytes", outlier_columns=3)).report
        dequantize(output, tmp_path / f"{architecture}-floats", DequantizeOptions())
        restored, original = weights(tmp_path / f"{architecture}-floats"), weights(source)
        layers = {f"{layer.name}.weight" for layer in report.layers}
        for name, tensor in original.items():
            if name not in layers:
                assert torch.equal(restored[name], tensor), name
                continue
            stored = sidecars(output)
            columns = stored[name.replace("weight", "outlier_cols")].long()
            weight, found = (each.t() if architecture == "gpt2" else each for each in (tensor, restored[name]))
            assert torch.equal(found[:, columns], weight[:, columns])
            absmax = weights(output)[name.replace("weight", "SCB")]
            rounded = found.abs().float() * torch.finfo(found.dtype).eps / 2
            limit = 0.5001 * undone(stored, name, absmax) + rounded
            assert bool(((found.float() - weight.float()).abs() <= limit).all())


def undone(stored: dict[str, Tensor], name: str, absmax: Tensor) -> Tensor:
    """The step of each value of a weight in the source: that of its row in int8, divided by its powers of two."""
    steps = (absmax / INT8_MAX)[:, None]
    if name + ROWS in stored:
        steps = steps / 2.0 ** stored[name + ROWS].float()[:, None]
    columns = name.replace(".weight", COLUMNS)
    return steps / 2.0 ** stored[columns].float() if columns in stored else steps


def test_load_model_runs_it_with_its_stored_columns(outliers: Path, words: Path, tmp_path: Path) -> None:
    convert(outliers, tmp_path / "out", options(words))
    convert(outliers, tmp_path / "plain", options(None, smooth="none", outlier_columns=None, outliers="none"))
    exact = logits(from_transformers(outliers)).float()
    errors = [
        float((logits(load_model(tmp_path / name, inputs="absmax")).float() - exact).norm())
        for name in ("out", "plain")
    ]
    assert errors[0] < errors[1] / 2


def test_evaluate_says_of_the_conversion_what_it_promised_of_the_model(
    model: Path, words: Path, tmp_path: Path
) -> None:
    convert(model, tmp_path / "out", options(words))
    statistics = smoothed_statistics(model, stored_columns=2)
    chosen = columns_from(statistics, 2)
    columns = ChosenColumns(chosen.by_layer, chosen.provenance, smoothing=smoothing_from(statistics, 2))
    pairs = {
        "smoothed-vector-wise": "vector-wise",
        "smoothed-bitsandbytes": "bitsandbytes",
        "smoothed-stored": "zeropoint-llm-int8-stored",
    }
    run = EvaluationRun(chosen_methods([*pairs, *pairs.values()]), Sampling(48, 16))
    text = some_text(200, seed=1)
    with opened_source(str(model), revision=None, download_dir=tmp_path / "incoming") as source:
        promised = evaluate(find_subject(source, None), text, columns, run, SILENT)
        with opened_source(str(tmp_path / "out"), revision=None, download_dir=tmp_path / "incoming") as converted:
            run = replace(run, methods=chosen_methods(list(pairs.values())))
            found = evaluate(find_subject(converted, source), text, None, run, SILENT)
    for smoothed, plain in pairs.items():
        one, other = promised.method(smoothed), found.method(plain)
        assert one is not None
        assert other is not None
        assert one.scores == other.scores
        assert one.layers == other.layers


# Options, and what they write down


def test_statistics_of_a_file_smooth_without_stored_columns_too(model: Path, words: Path, tmp_path: Path) -> None:
    save_statistics(smoothed_statistics(model), tmp_path / "found.safetensors")
    file = str(tmp_path / "found.safetensors")
    convert(model, tmp_path / "auto", options(words))
    report = convert(model, tmp_path / "out", options(None, smooth=file, outliers="none", outlier_columns=None)).report
    assert report.settings["smooth"] == "exact"
    assert report.stored is not None
    assert report.stored.total.columns == 0
    by_run, by_file = weights(tmp_path / "auto"), weights(tmp_path / "out")
    assert all(torch.equal(each, by_file[name]) for name, each in by_run.items())
    assert "## Smoothing" in (tmp_path / "out/README.md").read_text()
    assert "## Stored columns" not in (tmp_path / "out/README.md").read_text()
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "out")]).output
    assert "exponents of the smoothing in int8/outliers" in shown
    assert "plain int8\n" in shown
    assert [check.name for check in verified(tmp_path / "out", model).checks if check.failures] == []


class Untouched(SilentProgress):
    """Fails as soon as a shard is to be converted."""

    def begin(self, task: str, parts: Mapping[str, int], *, unit: str = BYTES, finished: Collection[str] = ()) -> None:
        assert task != "convert"


@pytest.mark.parametrize("outlier_columns", [0, 2])
def test_statistics_whose_exponents_do_not_fit_are_refused_before_the_first_shard(
    outlier_columns: int, model: Path, tmp_path: Path
) -> None:
    statistics = smoothed_statistics(model)
    save_statistics(statistics, file := tmp_path / "found.safetensors")
    site = next(site for site in statistics.linear_sites if site.name == change_exponents(file))
    how = options(None, smooth=str(file), outlier_columns=outlier_columns)
    with pytest.raises(StatisticsFileError, match="contradicts itself") as raised:
        convert(model, tmp_path / "out", how, progress=Untouched())
    assert any(f"{linear.name}.weight is multiplied" in str(raised.value) for linear in site.linears)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def changed_site(statistics: OutlierStatistics, change: Callable[[SiteSmoothing], SiteSmoothing]) -> OutlierStatistics:
    """The first smoothed site with another smoothing."""
    sites = list(statistics.sites)
    place, site = next((place, site) for place, site in enumerate(sites) if site.smoothing is not None)
    assert site.smoothing is not None
    sites[place] = replace(site, smoothing=change(site.smoothing))
    return replace(statistics, sites=tuple(sites))


def without_division(smoothing: SiteSmoothing) -> SiteSmoothing:
    return replace(smoothing, scaled=())


def divided_often(smoothing: SiteSmoothing) -> SiteSmoothing:
    """As if several sites divided by the largest scale there is, which int8 cannot add up."""
    rows = torch.full_like(smoothing.scaled[0].exponents, -MAX_EXPONENT * smoothing.steps)
    return replace(smoothing, scaled=(replace(smoothing.scaled[0], exponents=rows),))


@pytest.mark.parametrize(
    ("change", "copies", "reason"),
    [
        (without_division, 1, "is multiplied by scales, and nothing divides its input"),
        (divided_often, 12, "is scaled more than once, and by too much"),
    ],
)
def test_other_contradictions_in_statistics_are_found_too(
    change: Callable[[SiteSmoothing], SiteSmoothing], copies: int, reason: str, model: Path, tmp_path: Path
) -> None:
    found = changed_site(smoothed_statistics(model), change)
    place = next(place for place, site in enumerate(found.sites) if site.smoothing is not None)
    copied = (replace(found.sites[place], name=f"again{each}") for each in range(copies - 1))
    save_statistics(replace(found, sites=(*found.sites, *copied)), file := tmp_path / "found.safetensors")
    with pytest.raises(StatisticsFileError, match=reason):
        convert(model, tmp_path / "out", options(None, smooth=str(file)), progress=Untouched())


@pytest.mark.parametrize(("inputs", "said"), [("none", True), ("absmax", False)])
def test_exponents_of_a_file_for_another_product_are_called_so(
    inputs: InputsName, said: bool, model: Path, tmp_path: Path
) -> None:
    save_statistics(smoothed_statistics(model), tmp_path / "found.safetensors")
    notes = Notes()
    how = options(None, smooth=str(tmp_path / "found.safetensors"), outlier_columns=None, inputs=inputs)
    convert(model, tmp_path / "out", how, progress=notes)
    assert any("those for int8 inputs" in note for note in notes.said) == said


def test_weights_alone_are_smoothed_for_the_product_that_they_are_in(
    outliers: Path, words: Path, tmp_path: Path
) -> None:
    """By default, and with other exponents than where inputs are rounded too."""
    found = {}
    for inputs in ("none", "absmax"):
        output = tmp_path / inputs
        report = convert(outliers, output, options(words, smooth=None, inputs=inputs, outlier_columns=0)).report
        assert report.smoothing is not None
        assert report.smoothing.smoothed == report.smoothing.layers
        assert verified(output, outliers).passed
        found[inputs] = {name: each for name, each in sidecars(output).items() if name.endswith(COLUMNS)}
    assert found["none"].keys() == found["absmax"].keys()
    assert any(not torch.equal(found["none"][name], found["absmax"][name]) for name in found["none"])


@pytest.mark.parametrize("outliers", ["none", "weights"])
def test_without_activations_nothing_is_smoothed_and_that_is_said(outliers: str, model: Path, tmp_path: Path) -> None:
    notes = Notes()
    chosen = options(None, outliers=outliers, smooth=None, outlier_columns=None)
    report = convert(model, tmp_path / "out", chosen, progress=notes).report
    assert report.settings["smooth"] == "none"
    assert report.smoothing is None
    assert any(note.startswith("not smoothed: ") for note in notes.said)
    assert not [name for name in sidecars(tmp_path / "out") if name.endswith((COLUMNS, ROWS))]


def test_the_layout_decides_unless_somebody_says_so(model: Path, words: Path, tmp_path: Path) -> None:
    for layout, smooth, expected in (
        ("compressed-tensors", None, "exact"),
        ("bitsandbytes", None, "none"),
        ("bitsandbytes", "auto", "exact"),
        ("compressed-tensors", "none", "none"),
    ):
        plan = plan_conversion(model, tmp_path / "out", options(words, layout, smooth=smooth))  # type: ignore[arg-type]
        assert plan.settings.smooth == expected
        assert bool(plan.survey.smooth) == (expected == "exact")
    written = convert(model, tmp_path / "out", options(words)).report.sidecar_bytes
    assert written <= plan_conversion(model, tmp_path / "new", options(words)).survey.sidecar_bytes


def test_a_site_with_a_layer_in_16_bit_is_left_alone(model: Path, words: Path, tmp_path: Path) -> None:
    report = convert(model, tmp_path / "out", options(words, skip=("*.0.self_attn.q_proj",))).report
    reasons = {layer.name: layer.smoothing.reason for layer in report.layers if layer.smoothing}
    assert reasons["model.layers.0.self_attn.k_proj"] == "model.layers.0.self_attn.q_proj is not in int8"
    assert reasons["model.layers.1.self_attn.k_proj"] == ""
    smoothed = saved_like(model, tmp_path / "smoothed", smoothed_source(model, tmp_path / "out"))
    assert torch.equal(logits(from_transformers(model)), logits(from_transformers(smoothed)))


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    for smooth, outliers in (("atuo", "auto"), ("found.safetensors", "weights")):
        with pytest.raises(OptionError):
            convert(tmp_path, tmp_path / "out", ConvertOptions(smooth=smooth, outliers=outliers))


def test_the_command_and_its_report(model: Path, words: Path, tmp_path: Path) -> None:
    how = ["--text", str(words), "--tokens", "48", "--layout", "compressed-tensors", "--outlier-columns", "2"]
    found = CliRunner().invoke(app, ["convert", str(model), "-o", str(tmp_path / "out"), *how, "--json"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    smoothed = document["smoothing"]["smoothed"]
    assert smoothed > document["smoothing"]["layers"] / 2 == 7
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert f"{smoothed} of 14 layers, exactly, by powers of two" in shown.output
    dry = CliRunner().invoke(app, ["convert", str(model), "-o", str(tmp_path / "dry"), *how, "--dry-run"])
    assert "smoothed where the model proves to compute the same bits" in dry.output


def test_inspect_outliers_writes_what_convert_smooths(model: Path, words: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "found.safetensors")
    how = ["--text", str(words), "--tokens", "48", "--sequence-length", "16", "--work-dir", str(tmp_path / "work")]
    found = CliRunner().invoke(app, ["inspect-outliers", str(model), *how, "--smooth", "-o", file, "--quiet"])
    assert found.exit_code == 0, found.output
    report = convert(model, tmp_path / "out", ConvertOptions(smooth=file, outlier_columns=2)).report
    assert report.smoothing is not None
    assert report.smoothing.smoothed > 7
    assert report.stored is not None
    assert report.stored.total.columns == 28


# Interruptions


@pytest.fixture(scope="module")
def unbroken(model: Path, words: Path) -> dict[str, bytes]:
    return tree(convert(model, model.parent / "unbroken", options(words)).output)


@pytest.mark.parametrize("shard", [2, 5])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    shard: int, model: Path, words: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(StopError):
        convert(model, tmp_path / "out", options(words), progress=Stops(shard))
    resumed = Stops(0)
    convert(model, tmp_path / "out", options(words), progress=resumed)
    assert len(resumed.resumed[0]) == shard - 1
    assert tree(tmp_path / "out") == unbroken


@pytest.mark.parametrize(("workers", "threads"), [(1, 3), (2, 1)])
def test_any_number_of_workers_and_threads_writes_the_same_bytes(
    workers: int, threads: int, model: Path, words: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    convert(model, tmp_path / "out", options(words, workers=workers, threads=threads))
    assert tree(tmp_path / "out") == unbroken


def test_other_exponents_than_those_of_finished_shards_are_refused(model: Path, words: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(StopError):
        convert(model, output, options(words), progress=Stops(4))
    file = next(path for path in sorted((output / "int8/outliers").iterdir()) if exponents_of(path))
    tensors = read_tensors(file)
    for name in exponents_of(file):
        tensors[name] = tensors[name] + 1
    data = file.read_bytes()
    for tensor in (read_tensors(file)[name] for name in exponents_of(file)):
        data = data.replace(bytes(tensor.view(torch.uint8).tolist()), bytes((tensor + 1).view(torch.uint8).tolist()))
    file.write_bytes(data)
    with pytest.raises(SavedStateError, match="other exponents"):
        convert(model, output, options(words))


def test_shards_of_different_calibrations_are_not_finished(model: Path, words: Path, tmp_path: Path) -> None:
    """As if two machines had converted them, each with statistics of its own."""
    other = tmp_path / "other.txt"
    other.write_text(some_text(200, seed=9).text)
    convert(model, tmp_path / "one", options(words))
    convert(model, tmp_path / "two", options(other))
    fitting, mixed = ([*records_of(tmp_path / name)] for name in ("one", "one"))
    require_fitting(tmp_path / "one", fitting)
    for file in sorted((tmp_path / "one/int8/outliers").iterdir())[::2]:
        shutil.copy(tmp_path / "two/int8/outliers" / file.name, file)
    with pytest.raises(SavedStateError, match="different calibrations"):
        require_fitting(tmp_path / "one", mixed)
    assert "sidecars" in {check.name for check in verified(tmp_path / "one").checks if check.failures}


def records_of(output: Path) -> Iterator[ShardRecord]:
    store = RecordStore(output)
    conversion = store.conversion()
    assert conversion is not None
    yield from (record for shard in conversion.shards if (record := store.record(shard)) is not None)


def exponents_of(path: Path) -> list[str]:
    return [name for name in read_tensors(path) if name.endswith((COLUMNS, ROWS))]


def test_another_choice_is_refused_and_the_default_resumes_what_began(model: Path, words: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(StopError):
        convert(model, output, options(words, smooth="none"), progress=Stops(3))
    with pytest.raises(SettingsMismatchError, match="smooth"):
        convert(model, output, options(words))
    assert convert(model, output, options(words, smooth=None)).report.settings["smooth"] == "none"


# Damage


def test_damaged_exponents_are_found(model: Path, words: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", options(words))
    file = next(path for path in sorted((tmp_path / "out/int8/outliers").iterdir()) if exponents_of(path))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    failed = [check.name for check in verified(tmp_path / "out", model).checks if check.failures]
    assert "shards" in failed
    with pytest.raises(CheckpointError, match="exponents"):
        dequantize(tmp_path / "out", tmp_path / "floats", DequantizeOptions())


def test_a_changed_norm_is_found_against_the_source(model: Path, words: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", options(words))
    name = "model.layers.0.input_layernorm.weight"
    file = next(path for path in (tmp_path / "out").glob("*.safetensors") if name in read_tensors(path))
    tensors = read_tensors(file)
    tensors[name][3] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    found = {check.name: check.failures for check in verified(tmp_path / "out", model).checks if check.failures}
    assert any(failure.tensor == name for failure in found["weights"])


def test_a_value_that_would_lose_digits_is_refused() -> None:
    scaling = BlockScaling({"norm": TensorExponents(rows=bytes([256 - 3, 3]))}, "cpu")
    kept = scaling.scaled_vector("norm", Rectangle(0, 1, 0, 2), torch.tensor([[0.75, float("nan")]]).half())
    assert kept[0, 0] == 0.75 / 8
    with pytest.raises(InexactSmoothingError, match="power of two"):
        scaling.scaled_vector("norm", Rectangle(0, 1, 0, 2), torch.tensor([[3 * 2.0**-24, 1.0]]).half())
    with pytest.raises(InexactSmoothingError, match="power of two"):
        scaling.scaled_vector("norm", Rectangle(0, 1, 0, 2), torch.tensor([[1.0, 60000.0]]).half())
