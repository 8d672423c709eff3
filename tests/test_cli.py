"""The program as users see it: what it prints to stdout and stderr, its exit codes, and errors of usage."""

import dataclasses
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.program import (
    CONVERT,
    TERM,
    Nursery,
    Terminal,
    environment,
    llama,
    outcome_of,
    run,
    start,
    tree,
    wait_until,
)
from typer.testing import CliRunner

from int8cli import (
    ConvertOptions,
    DequantizeOptions,
    EstimateOptions,
    EvaluateOptions,
    GenerateOptions,
    InspectOptions,
    VerifyOptions,
    __version__,
)
from int8cli.cli import app
from int8cli.cli.convert import EXAMPLES
from int8cli.cli.convert_options import complete_outliers
from int8cli.cli.estimate_memory import complete_card
from int8cli.cli.evaluate import complete_methods
from int8cli.cli.options import LayoutName, complete_path, options_of
from int8cli.columns.wanted import MODES
from int8cli.commands.places import default_output
from int8cli.estimate.cards import parse_cards
from int8cli.results.method_names import METHOD_KEYS, chosen_keys

SHARDS = 3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama(tmp_path / "model", shards=SHARDS)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is large enough to interrupt its conversion."""
    directory = tmp_path_factory.mktemp("large") / "model"
    return llama(directory, layers=6, hidden=768, intermediate=2048, vocabulary=2048, shards=6)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


# Results and exit codes


def test_stdout_is_the_report_and_stderr_has_a_line_per_shard(model: Path) -> None:
    outcome = run(*CONVERT, "model", cwd=model.parent)
    assert outcome.code == 0
    first, *lines = outcome.err.splitlines()
    assert re.fullmatch(r"model: \d+ kB in 3 shards → model-int8: \d+ kB", first)
    assert [line.split()[:2] for line in lines] == [
        [f"[{number}/{SHARDS}]", f"model-0000{number}-of-0000{SHARDS}.safetensors:"] for number in range(1, SHARDS + 1)
    ]
    assert outcome.out.startswith("Done. model is in int8 in model-int8, 1.")
    assert "\nNext:\n  int8cli verify model-int8\n" in outcome.out
    assert len(outcome.out.splitlines()) <= 24
    assert not [line for line in outcome.out.splitlines() if line.endswith(" ")]
    assert "Worst layers" not in outcome.out
    assert "\x1b" not in outcome.out + outcome.err


def test_json_is_one_document_and_the_report_on_disk(model: Path, nursery: Nursery) -> None:
    outcome = nursery.run(*CONVERT, "model", "--json", cwd=model.parent)
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert report["schema"] == "int8cli.report/2"
    assert report == json.loads((model.parent / "model-int8/int8/report.json").read_text())
    assert len(outcome.err.splitlines()) == 1 + SHARDS
    assert len(report["layers"]) == report["totals"]["quantized_layers"] == 14
    errors = [layer["relative_frobenius_error"] for layer in report["layers"]]
    assert errors == sorted(errors, reverse=True)


def test_an_output_inside_the_source_is_warned_of(model: Path, nursery: Nursery) -> None:
    outcome = nursery.run(*CONVERT, "model", "-o", "model/int8-form", cwd=model.parent)
    assert outcome.code == 0
    assert "warning: model/int8-form is inside the directory of the source" in outcome.err
    assert "warning" not in nursery.run(*CONVERT, "model", cwd=model.parent).err


def test_the_directory_of_another_model_is_refused(model: Path, nursery: Nursery) -> None:
    other = model.parent / "other"
    other.mkdir()
    (other / "weights.safetensors").write_bytes(b"not ours")
    outcome = nursery.run(*CONVERT, "model", "-o", "other", cwd=model.parent)
    assert outcome.code == 1
    assert outcome.err.startswith("error: other holds another model (weights.safetensors)\nhint: ")
    assert os.listdir(other) == ["weights.safetensors"]


def test_settings_and_a_short_text_are_refused_before_torch_is_imported(model: Path) -> None:
    (model.parent / "short.txt").write_text("too short")
    assert run(*CONVERT, "model", cwd=model.parent).code == 0
    code = (
        "import sys; from int8cli.cli import app\n"
        "try: app(sys.argv[1:])\nexcept SystemExit as end: assert end.code == 1, end.code\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    commands = {
        ("convert", "model", "--outliers", "none", "--skip", "*v_proj"): "holds a conversion with skip none",
        ("convert", "model", "--outliers", "activations"): "with outliers 'none'",
        ("convert", "model", "-o", "new", "--text", "short.txt"): "short.txt has 9 bytes, too few",
        ("evaluate", "model", "--text", "short.txt"): "short.txt has 9 bytes, too few",
        ("inspect-outliers", "model", "--text", "short.txt"): "short.txt has 9 bytes, too few",
        ("evaluate", "model", "--methods", "vectorwise"): "unknown method 'vectorwise'",
    }
    for arguments, words in commands.items():
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=model.parent,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert words in done.stderr, (arguments, done.stderr)
        assert done.stderr.endswith("[]\n"), (arguments, done.stderr)


def test_details_are_the_tables_before_the_summary(model: Path, nursery: Nursery) -> None:
    short = nursery.run(*CONVERT, "model", cwd=model.parent)
    long = nursery.run(*CONVERT, "model", "--details", cwd=model.parent)
    assert long.code == 0
    tables, _, summary = long.out.partition("\n\nDone. ")
    assert "Worst layers" in tables
    without_cost = [line for line in short.out.splitlines() if line.split()[:1] not in (["took"], ["report"])]
    shown = [line for line in f"Done. {summary}".splitlines() if line.split()[:1] not in (["took"], ["report"])]
    assert [line.rstrip() for line in shown] == [line.rstrip() for line in without_cost]


def test_the_next_commands_are_to_be_copied(model: Path, nursery: Nursery) -> None:
    name = "it's a $model"
    os.rename(model, model.parent / name)
    outcome = nursery.run(*CONVERT, name, cwd=model.parent)
    assert outcome.code == 0, outcome.err
    commands = outcome.out.partition("\nNext:\n")[2].splitlines()
    verify = shlex.split(commands[0].strip())
    assert verify == ["int8cli", "verify", f"{name}-int8"]
    assert nursery.run(*verify[1:], cwd=model.parent).code == 0
    assert shlex.split(commands[2].strip()) == ["int8cli", "evaluate", f"{name}-int8", "--source", name]
    assert f"load_model({(name + '-int8')!r})" in shlex.split(commands[1].strip())[-1]


@pytest.mark.parametrize("options", [["--quiet"], ["-q"], ["-q", "--json"], ["-q", "--dry-run"]])
def test_quiet_shows_only_the_requested_output(options: list[str], model: Path, nursery: Nursery) -> None:
    outcome = nursery.run(*CONVERT, "model", *options, cwd=model.parent)
    assert (outcome.code, outcome.err) == (0, "")
    assert bool(outcome.out) == ("--json" in options)


def test_quiet_errors_still_show(nursery: Nursery, tmp_path: Path) -> None:
    outcome = nursery.run(*CONVERT, "./nothing", "-q", cwd=tmp_path)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ./nothing: no such file or directory\nhint: ")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_dry_run_writes_nothing_and_shows_the_size(options: list[str], model: Path, nursery: Nursery) -> None:
    before = tree(model.parent)
    outcome = nursery.run(*CONVERT, "model", "--dry-run", *options, cwd=model.parent)
    assert (outcome.code, outcome.err) == (0, "")
    assert tree(model.parent) == before
    assert nursery.run(*CONVERT, "model", "-q", cwd=model.parent).code == 0
    written = sum(path.stat().st_size for path in (model.parent / "model-int8").glob("*.safetensors"))
    if options:
        plan = json.loads(outcome.out)
        assert plan["schema"] == "int8cli.plan/1"
        assert plan["output_bytes"] == written
        for shard in plan["shards"]:
            assert (model.parent / "model-int8" / shard["output"]).stat().st_size == shard["output_bytes"]
    else:
        assert f"{written:,} bytes" in outcome.out


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_pattern_that_matches_nothing_gives_a_warning(options: list[str], model: Path, nursery: Nursery) -> None:
    outcome = nursery.run(*CONVERT, "model", "--skip", "*.donw_proj", *options, cwd=model.parent)
    assert outcome.code == 0
    assert "warning: no module matches '*.donw_proj'" in outcome.err


@pytest.mark.parametrize("options", [[], ["--json"], ["--dry-run"], ["--dry-run", "--json"]])
def test_a_closed_pipe_gives_no_traceback(options: list[str], model: Path) -> None:
    command = shlex.join([sys.executable, "-m", "int8cli", "convert", "model", "--outliers", "none", *options])
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1"], cwd=model.parent, env=environment(), capture_output=True, text=True
    )
    assert len(done.stdout.splitlines()) == 1
    assert not [line for line in done.stderr.splitlines() if not line.startswith(("[", "model: "))], done.stderr


@pytest.mark.parametrize("options", [["--json"], []])
def test_a_stdout_that_cannot_be_written_is_an_error(options: list[str], model: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "int8cli", "convert", "model", "--outliers", "none", "--dry-run", *options],
            cwd=model.parent,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error == "error: the result cannot be written to standard output: No space left on device"
    assert hint.startswith("hint: ")


def test_names_that_are_not_text_and_terminals_that_know_only_ascii(model: Path) -> None:
    os.close(os.open(os.fsencode(model) + b"/b\xffd.json", os.O_CREAT))
    outcome = run(*CONVERT, "model", cwd=model.parent, env={"PYTHONIOENCODING": "ascii"})
    assert outcome.code == 0, outcome.err
    assert outcome.out.isascii()
    again = run(*CONVERT, "model", "--json", cwd=model.parent)
    assert again.code == 0, again.err


# Usage


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--treshold", "5"], ["--treshold", "--threshold"]),
        (["--dryrun"], ["--dryrun", "--dry-run"]),
        (["--layout", "bitsandbites"], ["--layout", "bitsandbytes"]),
        (["--on-nonfinite", "ignore"], ["--on-nonfinite", "error", "keep"]),
        (["--float32", "half"], ["--float32", "direct", "float16"]),
        (["--device", "tpu"], ["--device", "cpu", "cuda"]),
        (["--threshold", "many"], ["--threshold"]),
        (["--threshold", "-1"], ["--threshold"]),
        (["--threshold", "nan"], ["--threshold"]),
        (["--threshold", "inf"], ["--threshold"]),
        (["--workers", "0"], ["--workers"]),
        (["extra"], ["extra"]),
    ],
)
def test_wrong_usage_says_what_would_be_right(args: list[str], words: list[str], model: Path, nursery: Nursery) -> None:
    outcome = nursery.run(*CONVERT, "model", *args, cwd=model.parent)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err
    assert not (model.parent / "model-int8").exists()


def test_a_missing_device_is_an_error(model: Path, nursery: Nursery) -> None:
    outcome = nursery.run(*CONVERT, "model", "--device", "cuda", cwd=model.parent, env={"CUDA_VISIBLE_DEVICES": ""})
    assert outcome.code == 2
    assert "no CUDA device" in outcome.err


def test_a_missing_model_and_a_wrong_command_are_usage_errors() -> None:
    assert CliRunner().invoke(app, ["convert"]).exit_code == 2
    wrong = CliRunner().invoke(app, ["conver", "model"])
    assert wrong.exit_code == 2
    assert "Did you mean 'convert'" in wrong.stderr


def test_the_version_is_shown() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"int8cli {__version__}\n")


def test_help_shows_every_option_and_examples_that_parse(
    model: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0
    text = plain(shown.stdout)
    for option in [
        "--output",
        "-o",
        "--revision",
        "--layout",
        "--threshold",
        "--skip",
        "--only",
        "--workers",
        "--device",
        "--keep-source",
        "--dry-run",
        "--overwrite",
        "--json",
        "--quiet",
    ]:
        assert option in text
    examples = [line for line in EXAMPLES.splitlines() if line.startswith("int8cli ")]
    assert examples
    for example in examples:
        assert example in text
        # With no Hub to ask and no such directory the model is missing (1); a wrong option would be usage (2).
        words = shlex.split(example.partition(">")[0])[1:]
        outcome = nursery.run(*words, cwd=model.parent, env={"HF_HUB_OFFLINE": "1"})
        assert outcome.code == 1, outcome.err


def test_the_help_of_every_command_is_plain_text() -> None:
    assert app.registered_commands
    for command in app.registered_commands:
        shown = CliRunner().invoke(app, [str(command.name), "--help"])
        assert shown.exit_code == 0
        assert "\n  Examples:\n\n  int8cli " in shown.stdout
        assert "[bold]" not in shown.stdout
        assert "\x08" not in shown.stdout


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("int8cli con", "convert"),
        ("int8cli convert --lay", "--layout"),
        ("int8cli convert mod", "model/"),
        ("int8cli convert model --outliers act", "activations"),
        ("int8cli evaluate model --methods vector-wise,smoothed-v", "vector-wise,smoothed-vector-wise"),
        ("int8cli estimate-memory model --gpu H100", "H100 80GB"),
    ],
)
def test_the_shell_completes_what_is_typed(typed: str, completed: str, model: Path) -> None:
    asked = {"_INT8CLI_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    shown = subprocess.run(
        [sys.executable, "-c", "from int8cli.cli import app; app(prog_name='int8cli')"],
        cwd=model.parent,
        env=environment(**asked),
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines() == [completed]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", "name-int8"),
        ("gpt2", "gpt2-int8"),
        ("model", "model-int8"),
        ("./model/", "model-int8"),
        ("model/one.safetensors", "one-int8"),
        (".", "here-int8"),
        ("..", "above-int8"),
    ],
)
def test_the_default_output_is_named_after_the_model(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "above" / "here"
    (here / "model").mkdir(parents=True)
    (here / "model/one.safetensors").touch()
    monkeypatch.chdir(here)
    assert default_output(name) == Path(expected)


def test_models_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/bloom").mkdir(parents=True)
    for name in ("models/bloom.safetensors", "models/bert.bin", "models/notes.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert list(complete_path("mod")) == ["models/"]
    assert list(complete_path("models/b")) == ["models/bert.bin", "models/bloom/", "models/bloom.safetensors"]
    assert list(complete_path("bigscience/bl")) == []


def test_outliers_are_completed_by_modes_and_by_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "auto-corpus").mkdir()
    (tmp_path / "weights.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert list(complete_outliers("")) == [*MODES, "auto-corpus/", "weights.safetensors"]
    assert list(complete_outliers("weights")) == ["weights", "weights.safetensors"]
    assert list(complete_outliers("auto-")) == ["auto-corpus/"]


def test_methods_are_completed_one_after_the_other() -> None:
    assert set(complete_methods("")) == {*METHOD_KEYS, "all"}
    assert list(complete_methods("all")) == ["all"]
    assert list(complete_methods("int8-weights,absmax-t")) == ["int8-weights,absmax-tensor"]
    for completed in complete_methods("vector-wise,smoothed-"):
        chosen_keys(tuple(completed.split(",")))  # every one is a name that evaluate takes


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("rtx 309", ["RTX 3090"]),
        ("8x RTX 309", ["8x RTX 3090"]),
        ("2x RTX 3090, T", ["2x RTX 3090, T4"]),
        ("2x RTX 3090, 4 x t", ["2x RTX 3090, 4 x T4"]),
        ("Voodoo", []),
    ],
)
def test_cards_are_completed(typed: str, completed: list[str]) -> None:
    assert list(complete_card(typed)) == completed
    for cards in completed:
        parse_cards(cards)  # what is completed is understood


# Fields of the library's options that a command does not have.
NOT_ON_THE_COMMAND_LINE = {
    ConvertOptions: {"sequence_length", "seed", "threads"},
    VerifyOptions: {"threads"},
}


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("convert", ConvertOptions),
        ("dequantize", DequantizeOptions),
        ("estimate-memory", EstimateOptions),
        ("evaluate", EvaluateOptions),
        ("generate", GenerateOptions),
        ("inspect-outliers", InspectOptions),
        ("verify", VerifyOptions),
    ],
)
def test_the_library_and_the_command_line_have_the_same_options_and_defaults(command: str, kind: Any) -> None:
    [function] = [each.callback for each in app.registered_commands if each.name == command and each.callback]
    parameters = inspect.signature(function).parameters
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields - set(parameters) == NOT_ON_THE_COMMAND_LINE.get(kind, set())
    assert options_of(kind, {name: each.default for name, each in parameters.items()}) == kind()


def test_what_is_parsed_reaches_the_library_in_its_own_form() -> None:
    given = {"skip": ["*.down_proj"], "layout": LayoutName.compressed_tensors, "text": Path("a.txt"), "quiet": True}
    options = options_of(ConvertOptions, given, tokens=7)
    assert options == ConvertOptions(skip=("*.down_proj",), layout="compressed-tensors", text=Path("a.txt"), tokens=7)
    assert (type(options.layout), type(options.skip)) == (str, tuple)


# A terminal


def on_terminal(*args: str, cwd: Path, **env: str) -> tuple[int, str]:
    """Run the program with all its streams on a terminal of 80 columns; returns its code and all that was drawn."""
    command = [sys.executable, "-m", "int8cli", *args]
    with Terminal() as terminal:
        to = terminal.descriptor
        env = environment(TERM=TERM, **env)
        code = subprocess.run(command, cwd=cwd, env=env, check=False, stdin=to, stdout=to, stderr=to).returncode
    return code, terminal.drawn


def test_a_terminal_gets_a_live_bar(large: Path, tmp_path: Path) -> None:
    code, drawn = on_terminal("convert", str(large), "-o", "out", cwd=tmp_path)
    assert code == 0
    lines = re.split(r"[\r\n]+", plain(drawn))
    frame = re.compile(r"^\S+ \d+(\.\d+)?/\d+\.\d MB +\d+(\.\d+)? [kMG]B/s +[\d:-]+ [1-6]/6 \S+ *$")
    frames = [line for line in lines if frame.match(line)]
    assert frames, lines[:20]
    assert not [line for line in lines if re.match(r"^\s+MB\s", line)], "a column was broken over two lines"
    assert max(map(len, lines)) <= 80 + len(str(large))
    assert len([line for line in lines if re.match(r"^\[\d/6\] model-0000\d-of-00006.safetensors: ", line)]) == 6


def test_no_color_is_honoured(model: Path) -> None:
    code, drawn = on_terminal("convert", "model", cwd=model.parent, NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", drawn)


# An interrupt


def group_exists(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupt_ends_the_run_cleanly_and_the_next_run_resumes(
    workers: str, large: Path, nursery: Nursery, tmp_path: Path
) -> None:
    process = start(*CONVERT, large, "-o", "out", "--workers", workers, cwd=tmp_path)
    output = tmp_path / "out"
    wait_until(lambda: any((output / "int8/partial").glob("*")))
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to everyone
    outcome = outcome_of(process)
    assert (outcome.code, outcome.out) == (130, "")
    assert "Traceback" not in outcome.err
    assert "interrupted: run the same command again to resume" in outcome.err
    wait_until(lambda: not group_exists(process.pid), "the end of the last child")
    assert not any((output / "int8/partial").glob("*"))
    assert not (output / "config.json").exists()
    assert nursery.run(*CONVERT, large, "-o", "out", "-q", cwd=tmp_path).code == 0
    assert nursery.run(*CONVERT, large, "-o", "unbroken", "-q", cwd=tmp_path).code == 0
    assert tree(output) == tree(tmp_path / "unbroken")


@pytest.mark.parametrize("pause_s", [0.0, 0.2])  # before, and while the first of them is waited for
def test_an_interrupt_while_workers_start_gives_no_traceback(pause_s: float, large: Path, tmp_path: Path) -> None:
    process = start(*CONVERT, large, "-o", "out", "--workers", "2", cwd=tmp_path)
    wait_until(lambda: (tmp_path / "out/LICENSE").exists())
    time.sleep(pause_s)
    os.killpg(process.pid, signal.SIGINT)
    outcome = outcome_of(process)
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
