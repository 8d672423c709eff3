"""What commands say before anything slow: that a package is missing, and how long the work takes."""

import importlib.util
from pathlib import Path

import pytest
from support.calibration_models import make_model
from support.checkpoints import WITHOUT_COLUMNS
from support.progress import CoherentProgress

from int8cli import (
    EvaluateOptions,
    InspectOptions,
    VerifyOptions,
    convert,
    dequantize,
    evaluate,
    inspect_outliers,
    verify,
)
from int8cli.errors import MissingExtraError

INSTALL = "pip install 'int8cli[calibrate]'"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model("llama", tmp_path / "model")


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else find(name, *a)
    )


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("int8cli.estimate.ways.DISK_BYTES_A_SECOND", 1000.0)
    monkeypatch.setattr("int8cli.estimate.ways._RESTORED_BYTES_A_SECOND", 1000.0)
    monkeypatch.setattr("int8cli.commands.verify._NOT_WORTH_MEASURING_BYTES", 0)


@pytest.mark.usefixtures("without_transformers")
def test_a_missing_package_is_named_before_anything_is_read(model: Path) -> None:
    progress = CoherentProgress()
    with pytest.raises(MissingExtraError, match="needs transformers, which is not installed") as missing:
        evaluate(model, EvaluateOptions(), progress=progress)
    with pytest.raises(MissingExtraError):
        inspect_outliers(model, InspectOptions(evidence="activations"), progress=progress)
    assert (missing.value.hint, progress.notes) == (f"{INSTALL}.", [])


@pytest.mark.usefixtures("without_transformers")
def test_a_fallback_names_the_command_that_makes_it_unnecessary(model: Path) -> None:
    progress = CoherentProgress()
    inspect_outliers(model, progress=progress)
    assert progress.notes == [
        f"cannot calibrate (running a model needs transformers, which is not installed: {INSTALL}); "
        "falling back to the weights",
        "model: found; loading torch",
    ]


@pytest.mark.usefixtures("slow_disk")
def test_long_work_says_how_long_it_takes(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", WITHOUT_COLUMNS)
    progress = CoherentProgress()
    verify(tmp_path / "out", progress=progress)
    verify(tmp_path / "out", VerifyOptions(source=model), progress=progress)
    dequantize(tmp_path / "out", tmp_path / "floats", progress=progress)
    plain, compared, restored = progress.notes
    assert plain.startswith("reading ")
    assert " and converting " in compared
    assert restored.startswith("writing ")
    assert all(note.endswith(" on this machine") and ": about " in note for note in progress.notes)


def test_short_work_says_nothing(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", WITHOUT_COLUMNS)
    progress = CoherentProgress()
    verify(tmp_path / "out", VerifyOptions(source=model), progress=progress)
    dequantize(tmp_path / "out", tmp_path / "floats", progress=progress)
    assert progress.notes == []
