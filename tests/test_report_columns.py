"""Reports on stored columns: how many, how they were chosen, and the output error with and without them."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    WITHOUT_COLUMNS,
    convert_storing,
    in_features_of,
    read_json,
    save_by_hand,
    some_columns,
    stored_at,
    survey,
)
from support.program import llama

from int8cli import convert
from int8cli.checkpoint.locate import open_source
from int8cli.planning.decisions import Decision
from int8cli.planning.needs import Needs
from int8cli.planning.survey import Survey
from int8cli.records.conversion import FROM_ACTIVATIONS, FROM_STATISTICS, FROM_WEIGHTS, Settings
from int8cli.report.conversion import show_report
from int8cli.report.plan import plan_to_json, show_plan
from int8cli.results.conversion import ConversionReport
from int8cli.results.stored_columns import RelativeOutputError, StoredColumn, StoredColumns

TEXT = "a sample (Ruth): 4,096 tokens in sequences of 512, seed 0"
CHOSEN = f"chosen by running the model on {TEXT}"
SUSPECTS = "guessed from the weights, not confirmed by running the model"
V_PROJ = "self_attn.v_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


def calibrated(decision: Decision) -> StoredColumns:
    """Measured errors of 0.04 and 0.08 in the two layers' v_proj, 0.02 elsewhere; half of it with stored columns."""
    error = 0.02
    if V_PROJ in decision.module:
        error = 0.04 if "layers.0." in decision.module else 0.08
    columns = some_columns(decision)
    shares = [StoredColumn(at, 7.0, share) for at, share in zip(columns.indices, (0.1, 0.6, 0.2), strict=True)]
    return replace(
        columns,
        columns=tuple(shares),
        predicted=RelativeOutputError(error * 1.5, error),
        measured=RelativeOutputError(error, error / 2),
    )


def predicted(decision: Decision) -> StoredColumns:
    return replace(calibrated(decision), measured=None)


def suspected(decision: Decision) -> StoredColumns | None:
    """The same three dimensions wherever a norm feeds, as the weights tell them."""
    if decision.module.endswith(("o_proj", "down_proj")):
        return None
    columns = tuple(StoredColumn(index, suspicion=score) for index, score in ((3, 1.0), (8, 9.0), (40, 2.0)))
    return replace(stored_at(decision, 3, 8, 40), chosen_from=FROM_WEIGHTS, columns=columns)


def converted(
    model: Path, stored: Callable[[Decision], StoredColumns | None], chosen_from: str = FROM_ACTIVATIONS
) -> tuple[ConversionReport, Path]:
    calibration = TEXT if chosen_from == FROM_ACTIVATIONS else ""
    output = model.parent / "out"
    return convert_storing(model, output, stored, chosen_from=chosen_from, calibration=calibration).report, output


def shown(report: ConversionReport, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on the terminal."""
    capsys.readouterr()
    show_report(report, Path("out"))
    lines = capsys.readouterr().out.splitlines()
    return [line.strip() for line in lines]


def in_one(lines: list[str]) -> str:
    return " ".join(lines)


# The report on the terminal


def test_a_measured_output_error_comes_first_in_the_report(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, _ = converted(model, calibrated)
    lines = shown(report, capsys)
    size = f"{report.sidecar_bytes / 1000:.2f} kB, {100 * report.sidecar_bytes / report.output_bytes:.1f} % more"
    assert lines[3] == f"42 columns of 14 layers stored exactly in int8/outliers: {size}"
    assert CHOSEN in in_one(lines)
    # (12 * 0.02 + 0.04 + 0.08) / 14
    assert "Mean layer output error: 2.6 % plain int8, 1.3 % with exact columns" in lines
    titles = ["Output error (measured), by kind of layer", "Worst layers by output error"]
    places = [lines.index(title) for title in (*titles, "Quantized, by kind of layer", "Not quantized")]
    assert places == sorted(places)
    assert "Worst layers" not in lines
    kinds, worst = lines[places[0] + 2], lines[places[1] + 2]
    assert kinds.split()[:3] == ["model.layers.*.self_attn.v_proj", "2", "6"]
    assert kinds.split()[-2:] == ["0.0600", "0.0300"]
    assert worst.split() == ["model.layers.1.self_attn.v_proj", "0.0800", "0.0400", "42", "63", "0"]


def test_a_predicted_error_is_labelled_as_predicted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(converted(model, predicted)[0], capsys)
    assert "Predicted output error: 3.9 % plain int8, at most 2.6 % with exact columns" in lines
    assert "Output error (predicted), by kind of layer" in lines
    assert "exact: with exact columns, at most" in in_one(lines)
    assert "measured" not in in_one(lines)


def test_one_layer_that_was_not_measured_makes_all_figures_predictions(model: Path) -> None:
    report, _ = converted(model, lambda e: (predicted if e.module == f"model.layers.0.{V_PROJ}" else calibrated)(e))
    assert report.stored is not None
    assert report.stored.basis == "predicted"
    error = report.stored.total.error
    assert error is not None
    assert dataclasses.astuple(error) == pytest.approx((1.5 * 0.36 / 14, 0.36 / 14), rel=1e-12)


def test_a_layer_that_never_ran_is_not_in_the_means(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, _ = converted(model, lambda e: None if V_PROJ in e.module else calibrated(e))
    assert report.stored is not None
    assert (report.stored.total.layers, report.stored.total.columns) == (12, 36)
    assert report.stored.total.error == RelativeOutputError(0.02, 0.01)
    row = next(line for line in shown(report, capsys) if line.startswith(f"model.layers.*.{V_PROJ} "))
    assert row.split()[1:] == ["0", "0", "0", "B", "-", "-"]


def test_suspects_are_called_suspects_wherever_they_are_shown(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, output = converted(model, suspected, FROM_WEIGHTS)
    lines = shown(report, capsys)
    assert lines[3].startswith("30 suspect columns of 10 layers stored exactly")
    assert SUSPECTS in in_one(lines)
    assert "Output error" not in in_one(lines)
    assert "Worst layers" in lines
    card = (output / "README.md").read_text()
    assert "has exact copies of 30 suspect columns of 10 layers" in card
    assert f"They are {SUSPECTS}." in card
    assert "utput error" not in card
    assert read_json(output / "int8/report.json")["settings"]["outliers"] == FROM_WEIGHTS


def test_statistics_are_named_by_their_digest(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = convert_storing(
        model, model.parent / "out", calibrated, chosen_from=FROM_STATISTICS, calibration="statistics 01ab"
    ).report
    assert "chosen from the statistics of a calibration (file 01ab)" in in_one(shown(report, capsys))


def test_without_stored_columns_they_are_not_mentioned(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = convert(model, model.parent / "out", WITHOUT_COLUMNS).report
    assert "columns" not in in_one(shown(report, capsys))
    assert "tored columns" not in (model.parent / "out/README.md").read_text()
    document = report.to_json()
    assert document["stored_columns"] is None
    assert document["totals"]["sidecar_bytes"] == 0


def test_long_names_are_whole_and_many_columns_are_not_all_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "an_encoder_of_a_name_that_is_longer_than_anyone_expects.layers.{}.mlp.up_proj.weight"
    tensors = {name.format(index): torch.randn(4, 2000).half() for index in range(12)}

    def many(decision: Decision) -> StoredColumns:
        columns = stored_at(decision, *range(0, in_features_of(decision), 7))
        return replace(columns, measured=RelativeOutputError(0.5, 0.25))

    report = convert_storing(save_by_hand(tmp_path / "source", tensors), tmp_path / "out", many).report
    lines = shown(report, capsys)
    assert sum(line.endswith(" …") for line in lines) == 10
    names = {name.format(index).removesuffix(".weight") for index in range(12)}
    assert sum(line.split()[0] in names for line in lines if line) == 10


# Report.json


def test_the_report_on_disk_contains_the_totals(model: Path) -> None:
    _, output = converted(model, calibrated)
    document = read_json(output / "int8/report.json")
    stored = document["stored_columns"]
    sidecars = [path.stat().st_size for path in (output / "int8/outliers").iterdir()]
    shards = [path.stat().st_size for path in output.glob("*.safetensors")]
    assert document["totals"]["sidecar_bytes"] == sum(sidecars)
    assert document["totals"]["output_bytes"] == sum(shards)
    assert (stored["layers"], stored["columns"], stored["error_basis"]) == (14, 42, "measured")
    assert stored["bytes"] == sum(layer["stored_columns"]["bytes"] for layer in document["layers"])
    means = {
        side: sum(layer["stored_columns"]["measured"][side] for layer in document["layers"]) / 14
        for side in ("all_int8", "with_stored")
    }
    assert stored["error"] == pytest.approx(means, rel=1e-12)
    assert stored["kinds"][0]["kind"] == f"model.layers.*.{V_PROJ}"
    assert sum(kind["columns"] for kind in stored["kinds"]) == 42


# The card


def test_the_card_says_what_they_are_and_how_to_use_them(model: Path) -> None:
    _, output = converted(model, calibrated)
    card = (output / "README.md").read_text()
    section = card.partition("## Stored columns\n")[2].partition("\n## ")[0]
    assert "`int8/outliers` has exact copies of 42 columns of 14 layers: " in section
    assert f"They are {CHOSEN}." in section
    assert "Other loaders ignore these files." in section
    assert 'from int8cli import load_model\n\nmodel = load_model(".")' in section
    assert "Mean output error of the layers, ‖error‖/‖X Wᵀ‖, measured:" in section
    assert any(
        line.startswith(f"| `model.layers.*.{V_PROJ}` | 2 | 6 |") and line.endswith("| 0.0600 | 0.0300 |")
        for line in section.splitlines()
    )
    assert section.splitlines()[-1].endswith("| 0.0257 | 0.0129 |")
    assert "## Worst layers by output error (measured)" in card
    assert f"| `model.layers.1.{V_PROJ}` | 0.0800 | 0.0400 | 42 63 0 |" in card


# The dry run


def planned(model: Path) -> tuple[Survey, Needs]:
    found = survey(model)
    counts = {each.spec.name: len(some_columns(each).columns) for each in found.plan.quantized}
    found = replace(found, stored_counts=counts)
    source = open_source(str(model), revision=None, download_dir=model.parent / "incoming")
    try:
        return found, Needs.of(source, found, model.parent / "out", buffer_bytes=found.buffer_bytes(1))
    finally:
        source.close()


def settings_of(outliers: str) -> Settings:
    return Settings("bitsandbytes", 6.0, (), (), "direct", outliers, 3, TEXT if outliers == FROM_ACTIVATIONS else "")


def test_a_dry_run_has_the_exact_sizes_of_sidecars(model: Path) -> None:
    found, needs = planned(model)
    document = json.loads(json.dumps(plan_to_json(found, needs, settings_of(FROM_ACTIVATIONS))))
    report, output = converted(model, calibrated)
    assert document["output_bytes"] == report.output_bytes
    assert document["sidecar_bytes"] == report.sidecar_bytes
    assert document["total_bytes"] == report.output_bytes + report.sidecar_bytes
    for shard in document["shards"]:
        assert (output / shard["sidecar"]).stat().st_size == shard["sidecar_bytes"]
    assert document["stored_columns"] == {
        "columns": 42,
        "layers": 14,
        "chosen_from": FROM_ACTIVATIONS,
        "columns_a_layer": 3,
        "budget": 0.0,
        "calibration": TEXT,
    }


@pytest.mark.parametrize(("outliers", "chosen"), [(FROM_ACTIVATIONS, CHOSEN), (FROM_WEIGHTS, SUSPECTS)])
def test_a_dry_run_shows_the_size_of_stored_columns_and_how_they_are_chosen(
    outliers: str, chosen: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, needs = planned(model)
    capsys.readouterr()
    show_plan(found, needs, Path("out"), settings_of(outliers))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["sidecars", f"{found.sidecar_bytes:,}", "bytes"] for line in lines)
    what = "suspect columns" if outliers == FROM_WEIGHTS else "columns"
    assert f"up to 42 {what} stored exactly, at most 3 per layer; {chosen}" in " ".join(map(str.strip, lines))


def test_a_dry_run_without_stored_columns_does_not_mention_them(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, needs = planned(model)
    found = replace(found, stored_counts=None)
    capsys.readouterr()
    show_plan(found, needs, Path("out"))
    assert "sidecars" not in capsys.readouterr().out
    document = plan_to_json(found, needs)
    assert (document["sidecar_bytes"], document["stored_columns"]) == (0, None)
    assert document["total_bytes"] == document["output_bytes"]


def test_the_disk_space_includes_sidecars(model: Path) -> None:
    """The room asked for covers all that is written, records and report included."""
    _, needs = planned(model)
    _, output = converted(model, calibrated)
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    assert written <= needs.disks[0].needed_bytes
