"""Evaluation of tiny real models, compared with transformers, bitsandbytes and float64."""

import dataclasses
import json
import math
import shutil
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.calibration_models import make_model, some_text
from support.checkpoints import WITHOUT_COLUMNS
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner, Result

from int8cli import ConvertOptions, convert
from int8cli.checkpoint.locate import opened_source
from int8cli.cli import app
from int8cli.commands.options import LayoutName
from int8cli.errors import NonFiniteError, ReferenceModelError, TextError, UnknownMethodError, UnsupportedModelError
from int8cli.evaluation.columns import ChosenColumns, calibrated_columns
from int8cli.evaluation.evaluate import evaluate
from int8cli.evaluation.methods import METHODS, chosen_methods
from int8cli.evaluation.options import EvaluationRun, applicable
from int8cli.evaluation.subject import find_subject
from int8cli.llm_int8.quantize import quantize_rowwise
from int8cli.model.sampling import Sampling
from int8cli.model.text import Text, sequences_of
from int8cli.outliers.calibrate import CalibrateOptions
from int8cli.progress import SILENT, Progress, SilentProgress
from int8cli.results.evaluation import REFERENCE, Evaluation, StoredColumnsSummary, evaluation_to_json

SAMPLING = Sampling(48, 16)
TEXT = some_text(200)


def evaluated(
    model: Path,
    *methods: str,
    reference: Path | None = None,
    columns: ChosenColumns | None = None,
    text: Text = TEXT,
    sampling: Sampling = SAMPLING,
    progress: Progress = SILENT,
    state_directory: Path | None = None,
) -> Evaluation:
    """Evaluate through the library as the command does."""
    with ExitStack() as stack:
        opened = [
            stack.enter_context(opened_source(str(path), revision=None, download_dir=path / "incoming"))
            for path in (model, reference or model)
        ]
        subject = find_subject(opened[0], opened[1] if reference else None)
        chosen = chosen_methods(methods)
        if columns is None and subject.converted is None and applicable(subject, chosen).needs_columns:
            other = some_text(200, seed=1)
            columns = calibrated_columns(subject, other, text, 8, CalibrateOptions(SAMPLING), progress)
        return evaluate(
            subject, text, columns, EvaluationRun(chosen, sampling, state_directory=state_directory), progress
        )


def whole_model(directory: Path, **kwargs: Any) -> Any:
    import transformers

    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(directory, **{"dtype": "auto", **kwargs}).eval()


def logits_of(model: Any, directory: Path) -> list[tuple[Tensor, Tensor]]:
    """Logits in float64 and the tokens they predict, by sequence, from one plain forward each."""
    found = []
    for inputs in sequences_of(TEXT, directory, model.config, SAMPLING):
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"]).logits[0]
        found.append((logits[:-1].double(), inputs["input_ids"][0, 1:]))
    return found


def nats(predictions: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [float(functional.cross_entropy(logits, targets)) for logits, targets in predictions]


def scores_of(found: Evaluation, key: str) -> Any:
    method = found.method(key)
    assert method is not None
    assert method.scores is not None
    return method.scores


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def sharpen(model: Any) -> None:
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(4.0)
            if name.endswith("input_layernorm.weight"):
                weight[5] = 20.0  # an outlier feature

    return make_model("llama", tmp_path_factory.mktemp("llama"), sharpen)


@pytest.fixture(scope="module")
def table(llama: Path) -> Evaluation:
    return evaluated(llama, "all")


@pytest.mark.parametrize("family", ["gpt2", "opt-projected", "gemma2"])
def test_16_bit_perplexity_is_that_of_transformers(tmp_path: Path, family: str) -> None:
    make_model(family, tmp_path)
    found = scores_of(evaluated(tmp_path, "int8-weights"), REFERENCE)
    expected = nats(logits_of(whole_model(tmp_path), tmp_path))
    assert found.nats_by_sequence == pytest.approx(expected, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-6)
    assert found.nats_over_reference is None


def test_bitsandbytes_row_is_the_model_as_bitsandbytes_runs_it(llama: Path, table: Evaluation) -> None:
    """The sums of 32 or 56 products stay below 2^24, so bitsandbytes is exact on every CPU."""
    from transformers import BitsAndBytesConfig

    quantized = whole_model(
        llama,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0),
        device_map="cpu",
    )
    expected = nats(logits_of(quantized, llama))
    assert scores_of(table, "bitsandbytes").nats_by_sequence == pytest.approx(expected, rel=1e-6)
    assert scores_of(table, "bitsandbytes").nats != scores_of(table, REFERENCE).nats


def test_divergence_and_same_top_are_those_of_the_two_models_logits(llama: Path, table: Evaluation) -> None:
    exact, restored = whole_model(llama), whole_model(llama)
    with torch.no_grad():
        for name, module in restored.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                data, absmax = quantize_rowwise(module.weight)
                module.weight.copy_(data.float() * (absmax / 127)[:, None])
    theirs, ours = logits_of(exact, llama), logits_of(restored, llama)
    found = scores_of(table, "int8-weights")
    assert found.nats_by_sequence == pytest.approx(nats(ours), rel=1e-6)
    differences = [mine - base for mine, base in zip(nats(ours), nats(theirs), strict=True)]
    mean = sum(differences) / 3
    assert found.nats_over_reference == pytest.approx(mean, abs=1e-6)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in differences) / 2)
    assert found.standard_error == pytest.approx(deviation / math.sqrt(3), abs=1e-6)
    shares = [(p.log_softmax(1), q.log_softmax(1)) for (p, _), (q, _) in zip(theirs, ours, strict=True)]
    divergence = torch.cat([(p.exp() * (p - q)).sum(1) for p, q in shares]).mean()
    assert found.kl_divergence == pytest.approx(float(divergence), rel=1e-3)
    same = torch.cat([q.gather(1, p.argmax(1, keepdim=True))[:, 0] == q.amax(1) for p, q in shares])
    assert found.same_top_share == pytest.approx(float(same.double().mean()))


def test_output_errors_are_of_each_layer_given_its_16_bit_input(llama: Path, table: Evaluation) -> None:
    name, model, taken = "model.layers.1.mlp.down_proj", whole_model(llama), []
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0][0]))
    logits_of(model, llama)
    data, absmax = quantize_rowwise(layer.weight.detach())
    wanted, found = [], []
    for inputs in (each.double() for each in taken):
        scale = inputs.abs().amax(dim=1, keepdim=True) / 127
        steps = torch.round(inputs / scale) * scale
        wanted.append(inputs @ layer.weight.detach().double().t())
        found.append(steps @ (data.double() * absmax.double()[:, None] / 127).t())
    error = torch.cat(found) - torch.cat(wanted)
    expected = float(error.norm() / torch.cat(wanted).norm())
    method = table.method("vector-wise")
    assert method is not None
    [measured] = [each for each in method.layers if each.name == name]
    assert measured.error == pytest.approx(expected, rel=1e-3)
    assert (measured.kind, measured.stack, measured.layer) == ("second feed-forward", "model.layers", 1)
    assert table.error_tokens == 48


def test_every_method_is_shown_and_better_methods_have_smaller_errors(table: Evaluation) -> None:
    assert [method.key for method in table.methods] == [method.key for method in METHODS]
    errors = {method.key: method.mean_error or 0.0 for method in table.methods}
    assert errors["absmax-tensor"] > errors["absmax-row"] > errors["vector-wise"] > errors["llm-int8-exact"]
    assert errors["zeropoint-tensor"] < errors["absmax-tensor"]
    assert errors["zeropoint-vector-wise"] < errors["vector-wise"]
    assert errors["bitsandbytes"] > errors["llm-int8-exact"] > errors["llm-int8-stored"]
    assert errors["zeropoint-llm-int8-stored"] < errors["llm-int8-stored"]
    assert table.int8_layers == 14
    for method in table.methods[1:]:
        assert len(method.layers) == 14
        assert method.worst_layer is not None
        assert method.worst_layer.error == max(layer.error for layer in method.layers)


def test_weights_that_int8_holds_exactly_change_nothing(tmp_path: Path) -> None:
    def make_exact(model: Any) -> None:
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.round(weight * 64).clamp(-126, 126) / 128)
                weight[:, 0] = 127 / 128

    make_model("llama", tmp_path, make_exact)
    found = evaluated(tmp_path, "int8-weights", "vector-wise")
    scores = scores_of(found, "int8-weights")
    assert scores.nats == scores_of(found, REFERENCE).nats
    assert (scores.nats_over_reference, scores.standard_error, scores.same_top_share) == (0.0, 0.0, 1.0)
    assert scores.kl_divergence == pytest.approx(0.0, abs=1e-7)
    assert scores_of(found, "vector-wise").kl_divergence > 1e-6


def test_encoders_get_output_errors_and_no_perplexity(tmp_path: Path) -> None:
    make_model("bert", tmp_path)
    found = evaluated(tmp_path)
    assert not found.predicts
    assert found.text.positions == 0
    for method in found.methods[1:]:
        assert method.scores is None
        assert len(method.layers) == found.int8_layers
        assert all(0.0 < layer.error < 0.2 for layer in method.layers)


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def test_a_head_that_the_checkpoint_lacks_is_said(tmp_path: Path, llama: Path) -> None:
    """Its file may be missing: that is not the same as a model without one."""
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    notes = Notes()
    found = evaluated(model, "vector-wise", progress=notes)
    assert any("no weights for the head of LlamaForCausalLM" in said for said in notes.said)
    assert not found.predicts
    convert(model, tmp_path / "out", dataclasses.replace(WITHOUT_COLUMNS, layout="bitsandbytes"))
    with pytest.raises(ReferenceModelError, match="no weights for the head of LlamaForCausalLM"):
        evaluated(tmp_path / "out")


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_predict_the_second_half_from_the_first(tmp_path: Path, family: str) -> None:
    make_model(family, tmp_path)
    found = evaluated(tmp_path, "vector-wise")
    model = whole_model(tmp_path)
    expected = []
    for inputs in sequences_of(TEXT, tmp_path, model.config, SAMPLING):
        tokens = inputs["input_ids"]
        given = torch.cat([inputs["decoder_input_ids"][:, :1], tokens[:, 8:-1]], dim=1)
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :8], decoder_input_ids=given).logits[0]
        expected.append(float(functional.cross_entropy(logits.double(), tokens[0, 8:])))
    assert scores_of(found, REFERENCE).nats_by_sequence == pytest.approx(expected, rel=1e-6)
    assert found.text.positions == 24
    vector_wise = found.method("vector-wise")
    assert vector_wise is not None
    assert len(vector_wise.layers) == found.int8_layers


@pytest.mark.parametrize(
    ("family", "layout"), [("llama", "bitsandbytes"), ("llama", "compressed-tensors"), ("gpt2", "bitsandbytes")]
)
def test_a_converted_model_is_evaluated_with_its_own_tensors(tmp_path: Path, family: str, layout: LayoutName) -> None:
    model = make_model(family, tmp_path / "model")
    output = tmp_path / "int8"
    convert(model, output, ConvertOptions(outliers="none", layout=layout))
    plain = evaluated(model, "bitsandbytes", "vector-wise", "int8-weights")
    alone = evaluated(output)
    assert [method.key for method in alone.methods] == ["bitsandbytes", "int8-weights"]
    assert (alone.converted, alone.reference) == (True, None)
    assert any("without the 16-bit model" in note for note in alone.notes)
    assert any("vector-wise" in note for note in alone.notes)
    for key in ("bitsandbytes", "int8-weights"):
        scores = scores_of(alone, key)
        assert scores.nats == pytest.approx(scores_of(plain, key).nats, rel=0 if layout == "bitsandbytes" else 1e-4)
        assert scores.nats_over_reference is None
        assert alone.method(key).layers == ()
    beside = evaluated(output, "bitsandbytes", "vector-wise", reference=model)
    assert (beside.model, beside.reference) == ("int8", "model")
    assert scores_of(beside, REFERENCE) == scores_of(plain, REFERENCE)
    if layout == "bitsandbytes":
        assert beside.method("bitsandbytes") == plain.method("bitsandbytes")
        assert beside.method("vector-wise") == plain.method("vector-wise")


def test_a_changed_int8_tensor_is_detected(tmp_path: Path) -> None:
    """The evaluation uses the tensors in the files, not those that they were made from."""
    model = make_model("llama", tmp_path / "model")
    convert(model, tmp_path / "int8", WITHOUT_COLUMNS)
    file = tmp_path / "int8" / "model.safetensors"
    tensors = load_file(file)
    before = evaluated(tmp_path / "int8", "bitsandbytes", reference=model)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros_like(tensors["model.layers.0.mlp.up_proj.weight"])
    save_file(tensors, file, metadata={"format": "pt"})
    after = evaluated(tmp_path / "int8", "bitsandbytes", reference=model)
    changed = [
        now.name
        for was, now in zip(before.method("bitsandbytes").layers, after.method("bitsandbytes").layers, strict=True)
        if was != now
    ]
    assert changed == ["model.layers.0.mlp.up_proj"]
    assert scores_of(after, "bitsandbytes").kl_divergence > scores_of(before, "bitsandbytes").kl_divergence


def test_stored_columns_of_a_conversion_are_used(tmp_path: Path, llama: Path) -> None:
    convert(llama, tmp_path / "int8", WITHOUT_COLUMNS)
    weights = load_file(llama / "model.safetensors")
    sidecar, chosen = {}, {}
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            columns = torch.tensor([1, 5], dtype=torch.int32)
            sidecar[f"{module}.outlier_cols"] = columns
            sidecar[f"{module}.outlier_weight"] = weight[:, columns.long()].contiguous()
            chosen[module] = (1, 5)
    place = tmp_path / "int8" / "int8" / "outliers"
    place.mkdir(parents=True, exist_ok=True)
    save_file(sidecar, place / "model.safetensors")
    alone = evaluated(tmp_path / "int8", "llm-int8-stored")
    by_hand = ChosenColumns(chosen, StoredColumnsSummary(2, "by hand", "", 0, 2.0))
    plain = evaluated(llama, "llm-int8-stored", "vector-wise", columns=by_hand)
    assert scores_of(alone, "llm-int8-stored").nats == scores_of(plain, "llm-int8-stored").nats
    assert scores_of(plain, "llm-int8-stored").nats != scores_of(plain, "vector-wise").nats
    assert alone.columns is not None
    assert alone.columns.mean_columns == 2.0


class StopsAfter(SilentProgress):
    """Interrupts an evaluation after some blocks, and counts the blocks of a later one."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.begun, self.finished = blocks, 0, -1
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def begin(self, task: str, parts: Mapping[str, int], *, unit: str = "", finished: Collection[str] = ()) -> None:
        self.finished = len(finished)

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
        if amount == 0:  # a block begins
            if self.begun == self.blocks:
                raise KeyboardInterrupt
            self.begun += 1


def test_an_interrupted_run_resumes_after_its_last_block(tmp_path: Path, llama: Path) -> None:
    methods = ("absmax-tensor", "bitsandbytes")
    kept = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        evaluated(llama, *methods, progress=StopsAfter(1), state_directory=kept)
    again = StopsAfter(9)
    found = evaluated(llama, *methods, progress=again, state_directory=kept)
    assert (again.finished, again.begun) == (1, 1)
    unbroken = evaluated(llama, *methods)
    assert dataclasses.replace(found, seconds=0.0) == dataclasses.replace(unbroken, seconds=0.0)
    assert not kept.exists()


@pytest.mark.parametrize("left_bytes", [0, 20])
@pytest.mark.parametrize("file", ["model.layers.0.json", "model.layers.0@1/0.pt"])
def test_state_that_cannot_be_read_back_is_made_again(tmp_path: Path, llama: Path, file: str, left_bytes: int) -> None:
    kept = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        evaluated(llama, "absmax-tensor", progress=StopsAfter(1), state_directory=kept)
    (kept / file).write_bytes((kept / file).read_bytes()[:left_bytes])
    again = StopsAfter(9)
    found = evaluated(llama, "absmax-tensor", progress=again, state_directory=kept)
    assert (again.finished, again.begun) == (0, 2)
    assert any(note.endswith("starting over") for note in again.notes)
    unbroken = evaluated(llama, "absmax-tensor")
    assert dataclasses.replace(found, seconds=0.0) == dataclasses.replace(unbroken, seconds=0.0)


def test_the_state_of_another_evaluation_is_not_resumed(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluated(llama, "absmax-tensor", progress=StopsAfter(1), state_directory=tmp_path / "state")
    again = StopsAfter(9)
    evaluated(llama, "bitsandbytes", progress=again, state_directory=tmp_path / "state")
    assert (again.finished, again.begun) == (0, 2)


def test_unknown_methods_get_a_suggestion() -> None:
    with pytest.raises(UnknownMethodError, match="vectorwise") as raised:
        chosen_methods(["vectorwise"])
    assert raised.value.hint.startswith("Did you mean vector-wise?")
    assert [method.key for method in chosen_methods(["int8-weights", "vector-wise"])] == ["vector-wise", "int8-weights"]


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(TextError, match="7 tokens"):
        evaluated(llama, "vector-wise", text=some_text(7))
    with pytest.raises(TextError, match="the text that chooses the stored columns"):
        evaluated(llama, "llm-int8-stored", text=some_text(200, seed=1))
    with pytest.raises(ReferenceModelError, match="not a converted model"):
        evaluated(llama, "vector-wise", reference=llama)
    convert(llama, tmp_path / "int8", WITHOUT_COLUMNS)
    other = make_model("gpt2", tmp_path / "other")
    with pytest.raises(ReferenceModelError, match="is not the source of int8"):
        evaluated(tmp_path / "int8", reference=other)
    with pytest.raises(UnsupportedModelError, match="none of these methods"):
        evaluated(tmp_path / "int8", "vector-wise")


@pytest.mark.parametrize(("place", "told"), [("up_proj", "its weight"), ("norm", "predictions")])
def test_nan_is_found_and_named(tmp_path: Path, place: str, told: str) -> None:
    def damage(model: Any) -> None:
        if place == "norm":
            model.model.norm.weight[3] = math.nan
        else:
            model.model.layers[1].mlp.up_proj.weight[2, 3] = math.nan

    make_model("llama", tmp_path, damage)
    with pytest.raises(NonFiniteError, match=told):
        evaluated(tmp_path, "int8-weights")


def run_command(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(TEXT.text)
    return path


def test_the_table_fits_eighty_columns(tmp_path: Path, llama: Path, words: Path) -> None:
    result = run_command(
        llama,
        "--text",
        words,
        "--tokens",
        32,
        "--sequence-length",
        16,
        "--methods",
        "absmax-tensor,bitsandbytes",
        "--methods",
        "int8-weights",
        "--work-dir",
        tmp_path,
    )
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    for key in ("16-bit", "absmax-tensor", "bitsandbytes", "int8-weights"):
        assert sum(line.split()[:1] == [key] for line in lines) == (1 if key == "16-bit" else 2)
    assert lines[-2].startswith(
        "Verdict: with transformers and bitsandbytes (bitsandbytes) the text's perplexity changes"
    )
    assert lines[-1].startswith("Took ")
    assert "[2/2] model.layers.1" in result.stderr
    assert not list(tmp_path.rglob("*.pt"))


def test_json_is_one_document(tmp_path: Path, llama: Path, words: Path) -> None:
    result = run_command(
        llama,
        "--text",
        words,
        "--tokens",
        32,
        "--sequence-length",
        16,
        "--methods",
        "vector-wise",
        "--json",
        "--quiet",
        "--work-dir",
        tmp_path,
    )
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert document["schema"] == "int8cli.evaluation/1"
    assert [method["key"] for method in document["methods"]] == ["16-bit", "vector-wise"]
    assert document["positions"] == 30
    assert document["methods"][1]["scores"]["perplexity"] > 1


def test_figures_that_json_cannot_hold_are_null(table: Evaluation) -> None:
    method = table.methods[1]
    assert method.scores is not None
    broken = dataclasses.replace(method, scores=dataclasses.replace(method.scores, nats=math.nan))
    document = evaluation_to_json(dataclasses.replace(table, methods=(broken,)))
    assert document["methods"][0]["scores"]["nats"] is None
    json.dumps(document, allow_nan=False)


def test_errors_of_use_end_with_a_hint(tmp_path: Path, llama: Path, words: Path) -> None:
    unknown = run_command(llama, "--methods", "zeropoint")
    assert unknown.exit_code == 1
    assert "hint: Did you mean zeropoint" in unknown.stderr
    picture = run_command(llama, "--output", tmp_path / "x.txt")
    assert picture.exit_code == 2
    bare = make_model("llama", tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    silent = run_command(bare, "--text", words, "--work-dir", tmp_path, "--methods", "vector-wise")
    assert silent.exit_code == 1
    assert "tokenizer" in silent.stderr
    assert "hint: " in silent.stderr
