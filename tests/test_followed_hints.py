"""What a hint says to do works: the command that failed, its hint, and the command that the hint names."""

import fcntl
import os
import re
from pathlib import Path

import pytest
import torch
from support.calibration_models import make_model, some_text
from support.checkpoints import read_all, read_json, save_by_hand, save_tiny
from support.program import CONVERT, Nursery, Outcome, llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("hints") / "model", shards=2)


class Follower:
    """Runs a command that fails and then one that its hint leads to, in one directory."""

    def __init__(self, nursery: Nursery, directory: Path) -> None:
        self._nursery, self.directory = nursery, directory

    def fails(self, *args: str | Path, hint: str) -> None:
        outcome = self._run(*args)
        assert outcome.code in (1, 2), outcome
        assert re.search(hint, " ".join(outcome.err.split())), outcome.err

    def fails_whatever(self, *args: str | Path, message: str, options: str = "") -> None:
        """The command fails with this message, and its hint names no options but these: no other one would help."""
        outcome = self._run(*args)
        assert outcome.code == 1, outcome
        shown, _, hint = " ".join(outcome.err.split()).partition("hint: ")
        assert message in shown, outcome.err
        assert " ".join(re.findall(r"(?<![\w-])--[a-z][a-z-]*", hint)) == options, outcome.err

    def works(self, *args: str | Path) -> Outcome:
        outcome = self._run(*args)
        assert outcome.code == 0, outcome.err
        return outcome

    def _run(self, *args: str | Path) -> Outcome:
        return self._nursery.run(*args, cwd=self.directory, env={"COLUMNS": "300"})


@pytest.fixture
def follow(nursery: Nursery, tmp_path: Path) -> Follower:
    return Follower(nursery, tmp_path)


def test_parts_that_cannot_run_the_model_take_columns_another_way(follow: Follower, model: Path) -> None:
    part = ("convert", model, "-o", "out", "--part", "1/2")
    hint = r"--outliers FILE\.safetensors, weights or none works in parts"
    follow.fails(*part, "--outliers", "activations", hint=hint)
    follow.works(*part, "--outliers", "none")


def test_parts_that_are_missing_are_shown_and_then_finished(follow: Follower, model: Path) -> None:
    finish = (*CONVERT, model, "-o", "out", "--finish")
    follow.works(*CONVERT, model, "-o", "out", "--part", "1/2")
    follow.fails(*finish, hint=r"int8cli status DIR shows the parts")
    assert "1 of 2" in follow.works("status", "out").out
    follow.works(*CONVERT, model, "-o", "out", "--part", "2/2")
    follow.works(*finish)


def test_a_part_has_no_report_and_the_whole_has(follow: Follower, model: Path) -> None:
    parts = [(*CONVERT, model, "-o", "out", "--part", f"{number}/2") for number in (1, 2)]
    follow.fails(*parts[0], "--report", "report.html", hint="--finish has one")
    for part in parts:
        follow.works(*part)
    follow.works(*CONVERT, model, "-o", "out", "--finish", "--report", "report.html")
    assert (follow.directory / "report.html").exists()


def test_other_settings_start_over_or_go_elsewhere(follow: Follower, model: Path) -> None:
    follow.works(*CONVERT, model, "-o", "out")
    other = (*CONVERT, model, "--threshold", "5")
    follow.fails(*other, "-o", "out", hint="--overwrite starts over, --output DIR names another directory")
    follow.works(*other, "--output", "elsewhere")
    follow.works(*other, "-o", "out", "--overwrite")


def test_an_output_is_verified_not_converted(follow: Follower, model: Path) -> None:
    follow.works(*CONVERT, model, "-o", "out")
    follow.fails("convert", "out", hint="int8cli verify DIR")
    follow.works("verify", "out")


def test_a_directory_that_is_taken_is_named_by_the_option(follow: Follower, model: Path) -> None:
    (follow.directory / "taken").mkdir()
    (follow.directory / "taken" / "model.safetensors.index.json").write_text("mine")
    follow.fails(*CONVERT, model, "-o", "taken", hint="--output DIR names another directory")
    follow.works(*CONVERT, model, "--output", "free")
    follow.fails("dequantize", "free", "-o", "taken", hint="--output OUT names another directory")
    follow.works("dequantize", "free", "--output", "floats")


def test_an_option_that_would_not_help_is_not_named(follow: Follower, model: Path) -> None:
    follow.fails_whatever("dequantize", model, "-o", "floats", message="is not a conversion")
    follow.works(*CONVERT, model, "-o", "out")
    conversion = follow.directory / "out/int8/conversion.json"
    files = follow.directory / "out/int8/files.json"
    whole, names = conversion.read_bytes(), files.read_bytes()
    files.unlink()
    follow.fails_whatever("dequantize", "out", "-o", "floats", message="not finished")
    files.write_bytes(names)
    conversion.write_bytes(whole[:-9])
    for command in (("dequantize", "out", "-o", "floats"), (*CONVERT, model, "-o", "out")):
        follow.fails_whatever(*command, message="damaged or was edited")
    conversion.write_bytes(whole)
    descriptor = os.open(conversion.parent, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        follow.fails_whatever("dequantize", "out", "-o", "floats", message="is being written")
        follow.fails_whatever(*CONVERT, model, "-o", "out", message="is in use by another", options="--output")
    finally:
        os.close(descriptor)
    follow.works("dequantize", "out", "-o", "floats")


@pytest.mark.parametrize("command", ["inspect-outliers", "evaluate"])
def test_a_longer_sequence_helps_a_short_text_and_no_other(command: str, follow: Follower) -> None:
    model = make_model("llama", follow.directory / "model")
    for name, data, options in (("no.txt", b"\xff", "--text"), ("short.txt", b"w1 w2", "--text --sequence-length")):
        (follow.directory / name).write_bytes(data)
        follow.fails_whatever(command, model, "--text", name, message=f"{name} ", options=options)


def test_a_model_without_suspects_stores_no_columns(follow: Follower) -> None:
    source = follow.directory / "source"
    save_by_hand(source, {f"layers.{layer}.proj.weight": torch.ones(8, 8) for layer in (0, 1)}, {"model_type": "novel"})
    follow.fails("convert", source, "--outliers", "weights", hint="--outliers none stores no columns")
    follow.works("convert", source, "--outliers", "none")


def test_a_model_without_linear_layers_shows_its_plan(follow: Follower) -> None:
    save_by_hand(follow.directory / "source", {"embeddings.word_embeddings.weight": torch.ones(9, 8)}, {})
    follow.fails("convert", "source", hint="--dry-run shows the plan")
    assert "embedding" in follow.works("convert", "source", "--dry-run", "--outliers", "none").out


def test_weights_with_nan_stay_floats(follow: Follower, tmp_path: Path) -> None:
    tiny = save_tiny("llama", tmp_path / "tiny")
    tensors = read_all(tiny)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_by_hand(tmp_path / "source", tensors, read_json(tiny / "config.json"))
    follow.fails(*CONVERT, "source", hint="--on-nonfinite keep")
    follow.works(*CONVERT, "source", "--on-nonfinite", "keep")


def test_a_file_to_smooth_by_is_made_as_the_hint_says(follow: Follower, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    smooth = ("convert", model, "--layout", "compressed-tensors", "--smooth", "made.safetensors", "-o", "out")
    hint = r"int8cli inspect-outliers MODEL --output FILE\.safetensors writes them; with --smooth, what to smooth too"
    follow.fails(*smooth, hint=hint)
    (tmp_path / "text.txt").write_text(some_text().text)
    follow.works(
        "inspect-outliers",
        model,
        "--text",
        "text.txt",
        "--output",
        "made.safetensors",
        "--smooth",
        "--tokens",
        "48",
        "--sequence-length",
        "16",
    )
    follow.works(*smooth)


@pytest.mark.parametrize("inputs", ["zeropoint", "none"])
def test_inputs_that_a_layout_cannot_say_need_another(inputs: str, follow: Follower, model: Path) -> None:
    options = (*CONVERT, model, "--inputs", inputs)
    follow.fails(*options, hint="needs the layout compressed-tensors")
    follow.works(*options, "--layout", "compressed-tensors", "--smooth", "none")
