"""The functions below the commands, used from Python."""

import dataclasses
import enum
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from support.calibration_models import make_model, some_text
from support.hub_stand_in import HubStandIn
from support.program import llama, tree
from support.progress import CoherentProgress

import int8cli
from int8cli import (
    ConvertOptions,
    DequantizeOptions,
    EstimateOptions,
    EvaluateOptions,
    GenerateOptions,
    InspectOptions,
    Int8cliError,
    VerifyOptions,
    convert,
    estimate_memory,
    evaluate,
    inspect_outliers,
    load_model,
    plan_conversion,
    verify,
)
from int8cli.checkpoint import locate
from int8cli.checkpoint.hub import HubOptions
from int8cli.cli import app
from int8cli.errors import CannotRunError, OptionError
from int8cli.estimate.cards import UnknownCardError
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.outliers.suspects import WeightSuspects

SHORT: dict[str, Any] = {"tokens": 48, "sequence_length": 16}
COMMANDS = {
    "convert": ConvertOptions,
    "dequantize": DequantizeOptions,
    "estimate-memory": EstimateOptions,
    "evaluate": EvaluateOptions,
    "generate": GenerateOptions,
    "inspect-outliers": InspectOptions,
    "verify": VerifyOptions,
}
# What the command line shows or writes with what the library found, and what it is about.
OF_THE_COMMAND_LINE = {
    "as_json",
    "chat",
    "details",
    "directory",
    "dry_run",
    "model",
    "output",
    "prompt",
    "quiet",
    "report",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("library")
    make_model("llama", root / "model", max_shard_size="30KB")
    (root / "words.txt").write_text(some_text().text)
    return root


@pytest.fixture(scope="module")
def converted(root: Path) -> Path:
    return convert(root / "model", root / "out", ConvertOptions(text=root / "words.txt", **SHORT)).output


@pytest.fixture
def progress() -> Iterator[CoherentProgress]:
    progress = CoherentProgress()
    yield progress
    assert progress.under_way() == []


# The options


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_those_of_the_command_line(command: str) -> None:
    def plain(value: Any) -> Any:
        return value.value if isinstance(value, enum.Enum) else None if value == () else value

    fields = {field.name: plain(field.default) for field in dataclasses.fields(COMMANDS[command])}
    parameters = vars(typer.main.get_command(app))["commands"][command].params
    shown = {each.name: plain(each.default) for each in parameters if each.name not in OF_THE_COMMAND_LINE}
    assert {name: fields[name] for name in shown} == shown
    # The library has all options, and a few more: threads, and those that only small test models need.
    assert set(fields) - set(shown) <= {"sequence_length", "seed", "threads"}


@pytest.mark.parametrize(
    ("options", "option", "words"),
    [
        (ConvertOptions(threshold=float("nan")), "threshold", "finite"),
        (ConvertOptions(outliers="wieghts"), "outliers", "did you mean weights"),
        (ConvertOptions(outliers="none", text=Path("a.txt")), "text", "has no effect"),
        (ConvertOptions(tokens=0), "tokens", "0 is less than 1"),
        (ConvertOptions(layout="gguf"), "layout", "'gguf' is not one of"),  # type: ignore[arg-type]
        (ConvertOptions(device="tpu"), "device", "'tpu' is not one of"),  # type: ignore[arg-type]
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(
    options: ConvertOptions, option: str, words: str, root: Path
) -> None:
    for function in (convert, plan_conversion):
        with pytest.raises(OptionError, match=words) as caught:
            function(root / "model", root / "never", options)
        assert caught.value.option == option
    assert not (root / "never").exists()


def test_the_options_of_other_functions_are_checked_too(root: Path, converted: Path) -> None:
    with pytest.raises(UnknownCardError, match="unknown card") as caught:
        estimate_memory(root / "model", EstimateOptions(gpu=("RTX 39090",)))
    assert caught.value.option == "gpu"
    with pytest.raises(OptionError, match="but no source"):
        verify(converted, VerifyOptions(revision="main"))
    with pytest.raises(OptionError, match="1 is less than 2"):
        inspect_outliers(root / "model", InspectOptions(sequence_length=1))
    with pytest.raises(OptionError, match="1 is less than 2"):
        evaluate(root / "model", EvaluateOptions(sequence_length=1))


# The functions


def test_convert_returns_what_it_wrote(root: Path, converted: Path, tmp_path: Path, progress: CoherentProgress) -> None:
    options = ConvertOptions(text=root / "words.txt", **SHORT)
    result = convert(str(root / "model"), tmp_path / "out", options, progress=progress)
    assert result.output == tmp_path / "out"
    assert result.report.settings["outliers"] == "activations"
    assert tree(result.output) == tree(converted)
    assert progress.tasks == ["convert", "calibrate"]
    shards = [path.name for path in (root / "model").glob("*.safetensors")]
    assert {part for part, outcome in progress.outcomes.items() if "→" in outcome} == set(shards)
    assert any(line.startswith("Choosing outlier columns by running the model on ") for line in progress.notes)
    assert any(line.startswith("running 48 tokens through 2 blocks") for line in progress.notes)


def test_the_output_has_a_default_name(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert(root / "model", options=ConvertOptions(outliers="none")).output == Path("model-int8")
    assert (tmp_path / "model-int8/config.json").is_file()


def test_a_second_call_resumes(root: Path, tmp_path: Path) -> None:
    options = ConvertOptions(outliers="none")
    convert(root / "model", tmp_path / "out", options)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    shards[0].unlink()
    progress = CoherentProgress()
    convert(root / "model", tmp_path / "out", options, progress=progress)
    assert progress.notes[1:] == [f"resuming: {len(shards) - 1} of {len(shards)} shards already converted"]
    assert len(progress.outcomes) == 1
    assert progress.under_way() == []


@pytest.mark.parametrize("lost", [0, 1])
def test_columns_are_announced_after_what_resumes_and_if_any_are_chosen(root: Path, tmp_path: Path, lost: int) -> None:
    options = ConvertOptions(outliers="weights")
    convert(root / "model", tmp_path / "out", options)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    for shard in shards[:lost]:
        shard.unlink()
    progress = CoherentProgress()
    convert(root / "model", tmp_path / "out", options, progress=progress)
    resuming, *later = progress.notes[1:]
    assert resuming == f"resuming: {len(shards) - lost} of {len(shards)} shards already converted"
    assert [line.partition(" from")[0] for line in later] == ["Choosing outlier columns"] * lost


def test_workers_report_as_one_process_does(tmp_path: Path, progress: CoherentProgress) -> None:
    model = llama(tmp_path / "model", shards=3)
    convert(model, tmp_path / "out", ConvertOptions(outliers="weights", workers=2), progress=progress)
    assert len(progress.outcomes) == 3


def test_a_plan_knows_the_sizes_and_writes_nothing(root: Path, converted: Path, tmp_path: Path) -> None:
    plan = plan_conversion(root / "model", tmp_path / "out", ConvertOptions(text=root / "words.txt", **SHORT))
    assert not (tmp_path / "out").exists()
    assert plan.output == tmp_path / "out"
    assert plan.settings.outliers == "activations"
    shards = list(converted.glob("*.safetensors"))
    assert plan.survey.output_bytes == sum(path.stat().st_size for path in shards)
    assert plan.needs.download_bytes == 0


def test_estimate_memory_answers_for_the_cards_that_were_named(root: Path) -> None:
    report = estimate_memory(root / "model", EstimateOptions(context=32, gpu=("24GiB",)))
    assert report.use.context == 32
    assert [answer.fits for answer in report.answers] == [True, True]
    assert report.estimate.weights.parameters > 0
    assert estimate_memory(root / "model").answers == ()


def test_inspect_outliers_runs_the_model_or_returns_suspects(
    root: Path, tmp_path: Path, progress: CoherentProgress
) -> None:
    options = InspectOptions(text=root / "words.txt", work_dir=tmp_path, **SHORT)
    statistics = inspect_outliers(root / "model", options, progress=progress)
    assert isinstance(statistics, OutlierStatistics)
    assert progress.tasks == ["calibrate"]
    suspects = inspect_outliers(root / "model", dataclasses.replace(options, evidence="weights"))
    assert isinstance(suspects, WeightSuspects)
    bare = llama(tmp_path / "bare")  # without a tokenizer
    assert isinstance(inspect_outliers(bare, options, progress=progress), WeightSuspects)
    assert any("falling back to the weights" in line for line in progress.notes)
    with pytest.raises(CannotRunError):
        inspect_outliers(bare, dataclasses.replace(options, evidence="activations"))


def test_verify_returns_the_verdict(root: Path, converted: Path, progress: CoherentProgress) -> None:
    import accelerate  # noqa: F401  # else the loader is imported in a process of its own, which takes seconds
    import bitsandbytes  # noqa: F401

    verification = verify(converted, VerifyOptions(source=root / "model"), progress=progress)
    assert verification.passed, verification.checks
    assert progress.tasks == ["read", "compare"]


def test_evaluate_compares_methods(root: Path, converted: Path, tmp_path: Path, progress: CoherentProgress) -> None:
    chosen = ("bitsandbytes", "llm-int8-stored")
    options = EvaluateOptions(text=root / "words.txt", methods=chosen, work_dir=tmp_path, **SHORT)
    found = evaluate(converted, dataclasses.replace(options, source=root / "model"), progress=progress)
    assert [method.key for method in found.methods] == ["16-bit", *chosen]
    assert progress.tasks == ["evaluate"]
    assert list(tmp_path.rglob("*.pt")) == []


def test_load_model_opens_what_convert_wrote(converted: Path) -> None:
    logits = load_model(converted, device="cpu")(torch.tensor([[5, 6, 7]])).logits
    assert logits.shape[:2] == (1, 3)


def test_a_model_on_the_hub_is_estimated_with_its_download(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: CoherentProgress
) -> None:
    with HubStandIn() as hub:
        hub.add_repo("org/model", root / "model")
        options = partial(HubOptions, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
        monkeypatch.setattr(locate, "HubOptions", options)
        convert("org/model", tmp_path / "out", ConvertOptions(outliers="none"), progress=progress)
    assert sorted(progress.tasks) == ["convert", "download"]


# Effects on the calling program


def test_importing_int8cli_imports_nothing_large() -> None:
    """Neither does making options, or listing the names."""
    code = (
        "import sys, int8cli; dir(int8cli); int8cli.ConvertOptions(); int8cli.EvaluateOptions()\n"
        "print([name for name in ('torch', 'rich', 'typer', 'huggingface_hub') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_exported_name_exists() -> None:
    for name in int8cli.__all__:
        assert getattr(int8cli, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        int8cli.nothing  # noqa: B018


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_torch_threads_is_restored(threads: int, root: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        convert(root / "model", tmp_path / "out", ConvertOptions(outliers="weights", workers=1))
        assert torch.get_num_threads() == threads
        with pytest.raises(Int8cliError):
            convert(tmp_path / "nothing", tmp_path / "out2")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_torch_that_a_conversion_imports_has_all_its_threads_afterwards(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from int8cli import ConvertOptions, convert\n"
        f"convert({str(root / 'model')!r}, {str(tmp_path / 'out')!r}, ConvertOptions(outliers='weights', workers=1))\n"
        "print(sys.modules['torch'].get_num_threads())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plain = "import torch; print(torch.get_num_threads())"
    expected = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=True)
    assert found.stdout == expected.stdout
