"""convert --outlier-budget: columns go where they save most, within a share of the output's bytes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration_models import calibrated, make_model
from support.checkpoints import read_all
from support.hub_stand_in import HubStandIn
from support.program import tree
from support.smoothing import planted, smoothed_statistics
from support.verifying import verified
from typer.testing import CliRunner

from int8cli import ConvertOptions, convert, plan_conversion
from int8cli.checkpoint import locate
from int8cli.checkpoint.hub import HubOptions
from int8cli.cli import app
from int8cli.errors import CannotRunError, CannotRunInPartsError, NoStatisticsYetError, OptionError
from int8cli.llm_int8.columns import shared_out
from int8cli.outliers.statistics_file import save_statistics
from int8cli.progress import SilentProgress
from int8cli.results.conversion import LayerReport

REPO = "org/model"
SHARE = 0.02


class StopError(Exception):
    """Ends a run in the middle."""


class StopsAt(SilentProgress):
    """Ends a run when a task is done with its so many-th part. Counts the finished parts."""

    def __init__(self, task: str = "", parts: int = 0) -> None:
        self._task, self._left = task, parts
        self.parts: list[tuple[str, str]] = []

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
        if part is None:
            return
        self.parts.append((task, part))
        if task == self._task:
            self._left -= 1
            if self._left == 0:
                raise StopError


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama") / "model", planted, max_shard_size="30KB")


@pytest.fixture(scope="module")
def statistics(model: Path) -> Path:
    path = model.parent / "statistics.safetensors"
    save_statistics(calibrated(model), path)
    return path


def options(outliers: str | Path = "auto", text: Path | None = None, **changes: Any) -> ConvertOptions:
    chosen = {"outlier_budget": SHARE, "tokens": 48, "sequence_length": 16, **changes}
    return ConvertOptions(outliers=outliers, text=text, **chosen)


def columns_of(layers: tuple[LayerReport, ...]) -> dict[str, tuple[int, ...]]:
    return {layer.name: layer.stored.indices for layer in layers if layer.stored is not None}


# The shares


def test_columns_go_where_they_save_most_for_their_bytes() -> None:
    savings = [torch.tensor([1.0, 9.0, 0.0]), torch.tensor([8.0, 8.0, 8.0])]
    assert shared_out(savings, [1, 2], 1) == [(1,), ()]
    assert shared_out(savings, [1, 2], 3) == [(1,), (0,)]  # the lower index of equal ones
    assert shared_out(savings, [1, 2], 4) == [(1,), (0,)]  # the next does not fit
    assert shared_out(savings, [1, 2], 100) == [(0, 1), (0, 1, 2)]  # never a column that saves nothing
    assert shared_out(savings, [1, 2], 0) == [(), ()]
    assert shared_out([], [], 10) == []


@pytest.mark.parametrize("seed", range(4))
def test_no_other_columns_of_the_same_bytes_save_more(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    savings = [torch.rand(count, generator=generator, dtype=torch.float64) for count in (5, 3, 8)]
    costs = [4, 4, 4]
    chosen = shared_out(savings, costs, 25)
    taken = sorted(float(part[column]) for part, columns in zip(savings, chosen, strict=True) for column in columns)
    assert taken == sorted(torch.cat(savings).tolist())[-6:]


# Conversions


def test_a_file_shares_the_budget_over_the_model(model: Path, statistics: Path, tmp_path: Path) -> None:
    plan = plan_conversion(model, tmp_path / "out", options(statistics))
    report = convert(model, tmp_path / "out", options(statistics)).report
    assert report.sidecar_bytes == plan.survey.sidecar_bytes
    stored = [layer.stored for layer in report.layers if layer.stored is not None]
    due = SHARE * report.output_bytes
    largest = max(each.bytes // len(each.columns) for each in stored if each.columns)
    assert due - largest < sum(each.bytes for each in stored) <= due
    counts = {len(each.columns) for each in stored}
    assert len(counts) > 1
    assert report.settings["outlier_budget"] == SHARE
    assert verified(tmp_path / "out", model).passed
    assert "2.0 % of the output shared out over all layers" in (tmp_path / "out/README.md").read_text()
    source, sidecars = read_all(model), read_all(tmp_path / "out/int8/outliers")
    for name, indices in columns_of(report.layers).items():
        assert sidecars[f"{name}.outlier_cols"].tolist() == list(indices)
        assert torch.equal(sidecars[f"{name}.outlier_weight"], source[f"{name}.weight"][:, list(indices)])


def test_a_model_on_disk_runs_to_its_end_before_the_first_shard(model: Path, words: Path, tmp_path: Path) -> None:
    progress = StopsAt()
    report = convert(model, tmp_path / "out", options(text=words), progress=progress).report
    tasks = [task for task, _ in progress.parts]
    assert "convert" not in tasks[: len(tasks) - tasks[::-1].index("calibrate")]
    assert report.settings["outliers"] == "activations"
    plan = plan_conversion(model, tmp_path / "other", options(text=words))
    assert report.sidecar_bytes <= plan.survey.sidecar_bytes
    assert verified(tmp_path / "out", model).passed


@pytest.mark.parametrize("stop", [("calibrate", 1), ("convert", 1)])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    stop: tuple[str, int], model: Path, words: Path, tmp_path: Path
) -> None:
    whole = convert(model, tmp_path / "whole", options(text=words)).output
    with pytest.raises(StopError):
        convert(model, tmp_path / "out", options(text=words), progress=StopsAt(*stop))
    assert tree(convert(model, tmp_path / "out", options(text=words)).output) == tree(whole)


def test_columns_are_shared_out_in_the_smoothed_model(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    save_statistics(smoothed_statistics(model), file)
    smooth = options(file, smooth=file, layout="compressed-tensors")
    report = convert(model, tmp_path / "smoothed", smooth).report
    plain = convert(model, tmp_path / "plain", options(file)).report
    assert report.smoothing is not None
    assert report.smoothing.smoothed
    assert columns_of(report.layers) != columns_of(plain.layers)
    assert verified(tmp_path / "smoothed", model).passed


def test_verify_finds_columns_beyond_the_budget(model: Path, statistics: Path, tmp_path: Path) -> None:
    output = convert(model, tmp_path / "out", options(statistics)).output
    document = json.loads((output / "int8/conversion.json").read_text())
    document["settings"]["outlier_budget"] = SHARE / 4
    (output / "int8/conversion.json").write_text(json.dumps(document))
    failures = [failure.problem for check in verified(output).checks for failure in check.failures]
    assert any("bytes of stored columns; the settings allow" in problem for problem in failures)


def test_resuming_with_another_budget_is_refused(model: Path, statistics: Path, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        convert(model, tmp_path / "out", options(statistics), progress=StopsAt("convert", 1))
    with pytest.raises(Exception, match="outlier_budget"):
        convert(model, tmp_path / "out", options(statistics, outlier_budget=SHARE / 2))


# What cannot be


def test_a_model_of_the_hub_is_refused_with_the_way_to_do_it(
    model: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubStandIn() as hub:
        hub.add_repo(REPO, model)
        monkeypatch.setattr(
            locate, "HubOptions", partial(HubOptions, endpoint=hub.endpoint, cache_dir=tmp_path / "hub")
        )
        for run in (convert, plan_conversion):
            with pytest.raises(NoStatisticsYetError, match="would be downloaded twice") as refused:
                run(REPO, tmp_path / "out", options(text=words))
            assert "Make statistics first" in refused.value.hint
        assert not [each for each in hub.requests if each.file and each.bytes_sent > 1 << 13]


def test_nothing_else_can_share_a_budget_out(model: Path, words: Path, tmp_path: Path) -> None:
    bare = tmp_path / "model"
    bare.mkdir()
    for file in model.iterdir():
        if not file.name.startswith("token"):
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CannotRunError):
        convert(bare, tmp_path / "out", options(text=words))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"outliers": "weights"}, "cannot tell how much storing a column helps"),
        ({"outliers": "none"}, "cannot tell how much storing a column helps"),
        ({"outlier_columns": 4}, "a number of columns for each layer is given too"),
        ({"outlier_budget": 0.0}, "is not a share of the output"),
        ({"outlier_budget": 1.5}, "is not a share of the output"),
        ({"outlier_budget": float("nan")}, "is not a share of the output"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, Any], error: str, tmp_path: Path) -> None:
    chosen = {"outliers": "auto", **changes}
    with pytest.raises(OptionError, match=error):
        convert(tmp_path, tmp_path / "out", options(**chosen))


def test_parts_need_the_statistics(model: Path, statistics: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotRunInPartsError):
        convert(model, tmp_path / "out", options(part=(1, 2)))
    for part in (1, 2):
        convert(model, tmp_path / "out", options(statistics, part=(part, 2)))
    whole = convert(model, tmp_path / "whole", options(statistics)).output
    assert read_all(tmp_path / "out/int8/outliers").keys() == read_all(whole / "int8/outliers").keys()
    assert verified(tmp_path / "out", model).passed


@pytest.mark.parametrize(("text", "status"), [("2%", 0), ("2 %", 0), ("2", 2), ("0%", 2), ("two%", 2), ("101%", 2)])
def test_the_command_line_takes_a_percentage(
    text: str, status: int, model: Path, statistics: Path, tmp_path: Path
) -> None:
    command = ["convert", str(model), "-o", str(tmp_path / "out"), "--outliers", str(statistics), "--dry-run"]
    result = CliRunner().invoke(app, [*command, "--outlier-budget", text, "--json"])
    assert result.exit_code == status
    if status == 0:
        stored = json.loads(result.stdout)["stored_columns"]
        assert stored["budget"] == SHARE
        assert stored["columns"] > 0
    else:
        assert "is not a percentage, such as 1%" in " ".join(result.output.split())


def test_the_dry_run_says_the_budget(model: Path, statistics: Path, tmp_path: Path) -> None:
    command = ["convert", str(model), "-o", str(tmp_path / "out"), "--outliers", str(statistics), "--dry-run"]
    result = CliRunner().invoke(app, [*command, "--outlier-budget", "2%"])
    assert "at most 2.0 % of the output" in " ".join(result.stdout.split())
