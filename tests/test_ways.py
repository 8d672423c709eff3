"""The ways to convert: what time and memory are made of, who is asked, and the speed of the machine."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from support.calibration_models import make_model
from support.progress import CoherentProgress

from int8cli import ConvertOptions, EstimateOptions, convert, estimate_memory, plan_conversion
from int8cli.cli import choosing
from int8cli.cli.options import parse_rate
from int8cli.commands import conversion_job as command
from int8cli.errors import OptionError
from int8cli.estimate.ways import Way
from int8cli.machine.speed import FILE, Speed, measured_beside, remember, remembered

SPEED = Speed(bfloat16=1e11, float16=1e10, float32=5e10, quantized_bytes=4e9)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model("llama", tmp_path / "model")


def ways_of(model: Path, **options: Any) -> tuple[Way, ...]:
    return plan_conversion(model, model.parent / "out", ConvertOptions(**options)).ways


def test_the_way_asked_for_comes_first_and_all_others_follow(model: Path) -> None:
    assert [way.outliers for way in ways_of(model)] == ["activations", "weights", "none"]
    assert [way.outliers for way in ways_of(model, outliers="none")] == ["none", "activations", "weights"]
    assert ways_of(model, outliers="weights")[0].outliers == "weights"
    assert [way.outliers for way in estimate_memory(model).ways] == [
        "activations",
        "weights",
        "none",
    ]


def test_more_tokens_take_longer_and_other_ways_take_less(model: Path) -> None:
    few, many = (ways_of(model, tokens=tokens)[0] for tokens in (512, 4096))
    assert (few.tokens, many.tokens) == (512, 4096)
    assert few.seconds is not None
    assert many.seconds is not None
    assert few.seconds < many.seconds
    first, *others = ways_of(model)
    for way in others:
        assert way.tokens == 0
        assert way.seconds is not None
        assert first.seconds is not None
        assert way.seconds < first.seconds
        assert way.memory_bytes < first.memory_bytes


def test_nobody_is_asked_where_it_is_short(model: Path) -> None:
    def ask(ways: Sequence[Way]) -> Way:
        raise AssertionError("asked")

    assert convert(model, model.parent / "out", choose=ask).report.settings["outliers"] == "activations"


@pytest.mark.parametrize("chosen", ["activations", "weights", "none"])
def test_the_way_that_is_chosen_is_taken_and_resumed(chosen: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "LONG_S", 0.0)
    asked = []

    def ask(ways: Sequence[Way]) -> Way:
        asked.append([way.outliers for way in ways])
        return next(way for way in ways if way.outliers == chosen)

    output = model.parent / "out"
    report = convert(model, output, choose=ask).report
    assert report.settings["outliers"] == chosen
    assert convert(model, output, choose=ask).report == report
    assert asked == [["activations", "weights", "none"]]  # the second time the directory knows
    for mode in ("none", "weights"):  # who says what he wants is not asked
        convert(model, model.parent / mode, ConvertOptions(outliers=mode), choose=ask)
    assert len(asked) == 1


def test_without_a_terminal_a_line_says_how_to_have_it_shorter(capsys: pytest.CaptureFixture[str]) -> None:
    ways = (Way("activations", 512, 49_000.0, 10**9, 10**9), Way("none", 0, 600.0, 10**8, 10**9))
    assert choosing.choose_way(ways) is ways[0]
    (line,) = capsys.readouterr().err.splitlines()
    assert "about 13.6 h" in line
    assert "--outliers none about 10 min" in line


def test_a_prediction_of_the_peak_is_near_what_a_run_takes(model: Path) -> None:
    way = ways_of(model, outliers="none")[0]
    assert 200_000_000 < way.memory_bytes < 400_000_000


def test_the_speed_of_this_machine_is_measured_beside_and_remembered(tmp_path: Path) -> None:
    assert remembered(tmp_path) is None
    found = measured_beside(tmp_path)
    assert found is not None
    assert all(rate > 1e6 for rate in asdict(found).values())
    assert remembered(tmp_path) == found
    faster = replace(found, bfloat16=2 * found.bfloat16, float32=found.float32 / 2)
    assert remember(faster, tmp_path) == replace(found, bfloat16=2 * found.bfloat16)


@pytest.mark.parametrize("damage", [b"", b"[]", b"\xff", b'{"schema": "int8cli.speed/0"}'])
def test_a_damaged_memory_of_the_speed_is_none(damage: bytes, tmp_path: Path) -> None:
    remember(SPEED, tmp_path)
    assert remembered(tmp_path) == SPEED
    (tmp_path / FILE).write_bytes(damage)
    assert remembered(tmp_path) is None
    assert remember(SPEED, tmp_path) == SPEED


def test_another_machine_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(SPEED, tmp_path)
    monkeypatch.setattr("int8cli.machine.speed.usable_cores", lambda: 77)
    assert remembered(tmp_path) is None


def test_a_machine_that_cannot_be_measured_has_no_times(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    progress = CoherentProgress()
    report = estimate_memory(model, progress=progress)
    assert [way.seconds for way in report.ways] == [None] * 3
    assert "measuring the speed of this machine, once" in progress.notes


# Several machines


def test_machines_take_the_time_of_the_largest_part(model: Path) -> None:
    one, two, many = estimate_memory(model, EstimateOptions(machines=(1, 2, 50))).on_machines
    assert [one.machines, two.machines, many.machines] == [1, 2, 50]
    assert one.source_bytes == sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert one.transfer_s is None
    assert one.seconds is not None
    assert many.seconds is not None
    assert many.seconds <= one.seconds
    assert estimate_memory(model).on_machines == ()


def test_the_slower_of_network_and_machine_counts(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", max_shard_size="12KB")

    def seconds(network: float) -> float:
        [found] = estimate_memory(model, EstimateOptions(machines=(2,), network=network)).on_machines
        assert found.transfer_s == found.source_bytes / network
        assert 1 < found.shards < len(list(model.glob("*.safetensors")))
        assert found.seconds is not None
        return found.seconds

    [alone] = estimate_memory(model, EstimateOptions(machines=(2,))).on_machines
    assert alone.seconds is not None
    slow = alone.source_bytes / 1e3
    assert seconds(1e12) == pytest.approx(alone.seconds, rel=1e-6)
    assert seconds(1e3) == pytest.approx(slow + alone.seconds / alone.shards)


@pytest.mark.parametrize(
    ("text", "rate"), [("1Gbit/s", 1.25e8), ("10 Gbit/s", 1.25e9), ("200MB/s", 2e8), ("2.5GB/s", 2.5e9), ("8Mbps", 1e6)]
)
def test_rates_have_units(text: str, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["1", "1 Gbit", "fast", "-1MB/s", "1kB/s", "1Gbit/s each"])
def test_a_rate_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not a rate such as"):
        parse_rate(text)


@pytest.mark.parametrize(("options", "option"), [({"machines": (0,)}, "machines"), ({"network": 0.0}, "network")])
def test_no_machines_and_no_network_are_refused(options: Any, option: str, model: Path) -> None:
    with pytest.raises(OptionError) as caught:
        estimate_memory(model, EstimateOptions(**options))
    assert caught.value.option == option
