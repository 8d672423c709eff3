"""Conversions without error figures: the same weights, and no report of errors that were not measured."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    WITHOUT_COLUMNS,
    convert_storing,
    read_all,
    read_json,
    save_by_hand,
    save_tiny,
    some_columns,
)
from support.program import CONVERT, Nursery, llama, tree
from support.verifying import verified

from int8cli import ConvertOptions, convert
from int8cli.commands.options import LayoutName
from int8cli.errors import NonFiniteError, SettingsMismatchError
from int8cli.planning.blocks import BLOCK_ELEMENTS
from int8cli.planning.decisions import Decision
from int8cli.records.conversion import FROM_WEIGHTS
from int8cli.records.shard_record import ShardRecord
from int8cli.report.conversion import show_report
from int8cli.results.conversion import ConversionReport, LayerReport
from int8cli.results.stored_columns import RelativeOutputError, StoredColumns

FIGURES_TOGETHER = ("relative_frobenius_error", "sqnr_db", "max_abs_error", "mean_range_use")
OF_A_LAYER = (
    *FIGURES_TOGETHER,
    "row_absmax_min",
    "row_absmax_max",
    "sum_squared_error",
    "sum_squared_weight",
    "sum_abs_data",
)
NOT_MEASURED = "weight error not measured"
SPEAK_OF_FIGURES = ("README.md", "int8/conversion.json", "int8/files.json", "int8/report.json")
WEIGHT = "layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


def weights_of(output: Path) -> dict[str, bytes]:
    """All files without figures, and the entries of the records about files."""
    files = {name: data for name, data in tree(output).items() if name not in SPEAK_OF_FIGURES}
    for name in [each for each in files if each.startswith("int8/records/") and each.endswith(".json")]:
        files[name] = json.dumps(json.loads(files[name])["files"]).encode()
    return files


UP = "layers.0.mlp.up_proj.weight"


def both(source: Path, stored: Callable[[Decision], StoredColumns] | None = None, **options: Any) -> tuple[Path, Path]:
    """The output with figures, and that without."""
    outputs = source.parent / "with", source.parent / "without"
    for output, figures in zip(outputs, (True, False), strict=True):
        convert_storing(source, output, stored, ConvertOptions(outliers="none", figures=figures, **options))
    return outputs


def suspected(decision: Decision) -> StoredColumns:
    return replace(some_columns(decision), chosen_from=FROM_WEIGHTS)


def measured(decision: Decision) -> StoredColumns:
    return replace(some_columns(decision), measured=RelativeOutputError(0.02, 0.01))


def shown(report: ConversionReport, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    show_report(report, Path("out"))
    return capsys.readouterr().out


# The weights


@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_and_sidecars_are_the_same(layout: LayoutName, dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source", dtype, max_shard_size="30KB")
    told, bare = map(weights_of, both(tmp_path / "source", layout=layout, stored=suspected))
    assert sum(name.startswith("int8/outliers/") for name in bare) > 1
    assert bare == told


@pytest.mark.parametrize("float32", ["direct", "float16"])
def test_rows_of_every_size_are_the_same(float32: str, tmp_path: Path) -> None:
    values = torch.randn(400, 700, generator=torch.Generator().manual_seed(0))
    rows = values * torch.logspace(-44, 4, 400, dtype=torch.float64).float()[:, None]
    wide = torch.randn(2, BLOCK_ELEMENTS + 9, generator=torch.Generator().manual_seed(1))
    wide[1] = 0.0
    save_by_hand(tmp_path / "source", {WEIGHT: rows, "layers.0.mlp.down_proj.weight": wide})
    told, bare = map(weights_of, both(tmp_path / "source", float32=float32))
    assert bare == told


def test_a_bin_with_transposed_weights_gives_the_same_output(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path / "saved", torch.float16)
    state = {name: tensor for name, tensor in read_all(tmp_path / "saved").items() if name != "lm_head.weight"}
    source = tmp_path / "source"
    source.mkdir()
    torch.save(state, source / "pytorch_model.bin")
    (source / "config.json").write_bytes((tmp_path / "saved/config.json").read_bytes())
    told, bare = map(weights_of, both(source))
    assert bare == told
    assert read_json(tmp_path / "without/int8/report.json")["totals"]["quantized_layers"] == 8


def test_a_non_finite_weight_is_refused_with_its_position_or_copied(tmp_path: Path) -> None:
    weight = torch.ones(1200, 700, dtype=torch.bfloat16)
    weight[1100, 450] = float("nan")
    sound = {"layers.0.mlp.down_proj.weight": torch.ones(4, 4, dtype=torch.bfloat16)}
    source = save_by_hand(tmp_path / "source", {WEIGHT: weight, **sound})
    with pytest.raises(NonFiniteError, match=rf"{WEIGHT} contains nan at row 1,100, column 450$"):
        convert(source, tmp_path / "refused", ConvertOptions(outliers="none", figures=False))
    told, bare = map(weights_of, both(source, on_nonfinite="keep"))
    assert bare == told
    report = read_json(tmp_path / "without/int8/report.json")
    assert [layer["name"] for layer in report["layers"]] == ["layers.0.mlp.down_proj"]


# Reports


def test_the_report_has_null_for_every_figure_and_everything_else(tmp_path: Path, model: Path) -> None:
    told, bare = (read_json(output / "int8/report.json") for output in both(model, stored=measured))
    assert (told["settings"].pop("figures"), bare["settings"].pop("figures")) == (True, False)
    names = [layer["name"] for layer in bare["layers"]]
    assert names == sorted(names)
    for document, figure in ((bare, type(None)), (told, float)):
        for layer in document["layers"]:
            assert {type(layer.pop(name)) for name in OF_A_LAYER} == {figure}
        for kind in document["kinds"]:
            assert {type(kind.pop(name)) for name in FIGURES_TOGETHER} == {figure}
            assert (kind.pop("worst_layer") is None) == (figure is not float)
        assert {type(document["totals"].pop(name)) for name in FIGURES_TOGETHER} == {figure}
        for part, name in (("layers", "name"), ("kinds", "kind")):
            document[part].sort(key=lambda each, name=name: each[name])
    assert bare == told


def test_a_record_without_figures_is_read_back(model: Path, tmp_path: Path) -> None:
    layer = convert(model, tmp_path / "out", ConvertOptions(outliers="none", figures=False)).report.layers[0]
    assert layer.sums is None
    assert LayerReport.from_json(json.loads(json.dumps(layer.to_json()))) == layer


def test_nothing_quantized_has_no_figures_either(tmp_path: Path) -> None:
    source = save_by_hand(tmp_path / "source", {UP: torch.ones(4, 4, dtype=torch.bfloat16)})
    for output in both(source, skip=("*up_proj",)):
        totals = read_json(output / "int8/report.json")["totals"]
        assert (totals["relative_frobenius_error"] is None) == (output.name == "without")


@pytest.mark.parametrize("stored", [None, suspected, measured])
def test_terminal_and_card_say_once_that_nothing_was_measured(
    stored: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen_from = {"chosen_from": FROM_WEIGHTS} if stored is suspected else {}
    text = shown(
        convert_storing(
            model, tmp_path / "out", stored, ConvertOptions(outliers="none", figures=False), **chosen_from
        ).report,
        capsys,
    )
    card = (tmp_path / "out/README.md").read_text()
    assert f"14 layers; {NOT_MEASURED}" in text
    assert "The error of the weights was not measured." in card
    for each in (text, card):
        assert each.count("not measured") == 1
        assert re.search(r"\bnan\b|\bNone\b|SQNR|dB|relative error|‖W-Ŵ‖| - |\| +\|$", each, re.MULTILINE) is None
        assert ("Worst layers by output error" in each or "Layers, by output error" in each) == (stored is measured)
    kinds = text.partition("Quantized, by kind of layer")[2].splitlines()
    assert kinds[1].split() == ["kind", "layers", "before", "after"]
    assert kinds[2].split() == ["model.layers.*.mlp.down_proj", "2", "24.6", "kB", "12.8", "kB"]
    assert "| `model.layers.*.mlp.down_proj` | 2 | 24.6 kB | 12.8 kB |" in card.splitlines()


def test_the_command_says_nothing_of_errors(model: Path, nursery: Nursery) -> None:
    asked = (*CONVERT, model, "-o", "out", "--no-figures")
    planned = nursery.run(*asked, "--dry-run", cwd=model.parent)
    assert "weight error: not measured" in planned.out
    assert json.loads(nursery.run(*asked, "--dry-run", "--json", cwd=model.parent).out)["figures"] is False
    outcome = nursery.run(*asked, "--json", cwd=model.parent)
    assert outcome.code == 0
    assert re.search(r"\[3/3\] \S+: .* → .* layers in", outcome.err)
    assert "error" not in outcome.err
    assert json.loads(outcome.out) == read_json(model.parent / "out/int8/report.json")
    with_figures = nursery.run(*CONVERT, model, "-o", "other", "--dry-run", "--json", cwd=model.parent)
    assert json.loads(with_figures.out)["figures"] is True


# Resume


@pytest.mark.parametrize("figures", [True, False])
def test_resuming_with_other_settings_is_refused_by_field(figures: bool, model: Path, nursery: Nursery) -> None:
    was, now = ("--figures", "--no-figures")[:: 1 if figures else -1]
    assert nursery.run(*CONVERT, model, "-o", "out", "-q", was, cwd=model.parent).code == 0
    before = tree(model.parent / "out")
    outcome = nursery.run(*CONVERT, model, "-o", "out", now, cwd=model.parent)
    assert outcome.code == 1
    assert f"with figures {figures}; this one has {not figures}" in outcome.err
    assert tree(model.parent / "out") == before
    assert nursery.run(*CONVERT, model, "-o", "out", "-q", was, cwd=model.parent).code == 0
    assert tree(model.parent / "out") == before


def test_an_output_of_an_earlier_version_has_figures(model: Path, tmp_path: Path) -> None:
    """Its settings do not mention them."""
    output = tmp_path / "out"
    convert(model, output, WITHOUT_COLUMNS)
    expected = tree(output)
    for name in ("conversion.json", "report.json"):
        document = read_json(output / "int8" / name)
        del document["settings"]["figures"]
        (output / "int8" / name).write_text(json.dumps(document))
    assert failures(output, report_as_written=False) == []
    with pytest.raises(SettingsMismatchError, match="figures True"):
        convert(model, output, ConvertOptions(outliers="none", figures=False))
    convert(model, output, WITHOUT_COLUMNS)
    assert {**tree(output), "int8/conversion.json": b""} == {**expected, "int8/conversion.json": b""}


# Verify


def failures(
    output: Path, source: Path | None = None, *, report_as_written: bool = True
) -> list[tuple[str, str, str | None, str]]:
    found = [(c.name, f.file, f.tensor, f.problem) for c in verified(output, source).checks for f in c.failures]
    return [each for each in found if report_as_written or each[:2] != ("files", "int8/report.json")]


@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
def test_verify_finds_nothing_wrong_and_claims_no_figures(layout: LayoutName, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    convert_storing(source, tmp_path / "out", suspected, ConvertOptions(outliers="none", figures=False, layout=layout))
    checks = {check.name: check for check in verified(tmp_path / "out", source).checks}
    assert {check.status for check in checks.values()} == {"passed"}
    assert checks["figures"].detail == "no errors were measured; shapes and sizes of 14 layers"
    assert checks["report"].detail == "source, settings, totals, sizes; no errors were measured"


def test_verify_still_compares_weights_and_sizes(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    convert(model, output, ConvertOptions(outliers="none", figures=False))
    shard = next(path for path in sorted(output.glob("*.safetensors")) if b'"I8"' in path.read_bytes())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    record = output / "int8/records" / f"{shard.stem}.json"
    document = read_json(record)
    document["layers"][0]["bytes_before"] += 1
    record.write_text(json.dumps(document))
    found = failures(output, model)
    assert {name for name, *_ in found} == {"shards", "weights", "figures", "report"}
    assert [each[2:] for each in found if each[0] == "figures"] == [
        (document["layers"][0]["name"], "its shape, kind or sizes differ from the report")
    ]


@pytest.mark.parametrize("figures", [True, False])
def test_verify_names_a_layer_whose_figures_go_against_the_settings(figures: bool, model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", ConvertOptions(outliers="none", figures=figures))
    convert(model, tmp_path / "other", ConvertOptions(outliers="none", figures=not figures))
    path = sorted((tmp_path / "out/int8/records").glob("*.json"))[0]
    path.write_bytes((tmp_path / "other/int8/records" / path.name).read_bytes())
    layers = ShardRecord.from_json(read_json(path)).layers
    assert layers
    problem = "has no error figures in its record" if figures else "has error figures, although none were measured"
    found = [each for each in failures(tmp_path / "out", model) if each[0] == "records"]
    shard = f"{path.stem}.safetensors"
    assert found == [("records", shard, layer.name, problem) for layer in layers]
