"""Files of outlier statistics from anywhere: read back, or refused with the place of the error."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from int8cli.errors import CheckpointError
from int8cli.llm_int8.inputs import InputStatistics
from int8cli.outliers.statistics import (
    NORM_FED,
    LinearStatistics,
    OutlierStatistics,
    Provenance,
    SiteStatistics,
)
from int8cli.outliers.statistics_file import load_statistics, save_statistics

PROVENANCE = Provenance("org/m", None, "", "text", "0" * 64, 12, 4, 0, "float32", 6.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    inputs = InputStatistics(8)
    inputs.update(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)))
    linear = LinearStatistics("h.0.q", 4, 8, torch.ones(8), 8.0, 2.0, (1, 5), 0.1, 0.05)
    site = SiteStatistics("h.0.input", NORM_FED, "h", 0, inputs.summary(), (linear,))
    path = tmp_path / "statistics.safetensors"
    save_statistics(OutlierStatistics(PROVENANCE, (site,)), path)
    return path


def rewritten(file: Path, change: Callable[[Any, dict[str, torch.Tensor]], object]) -> None:
    with safe_open(file, "pt") as opened:
        document = json.loads(opened.metadata()["int8cli"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(document, tensors)
    save_file(tensors, file, metadata={"int8cli": document if isinstance(document, str) else json.dumps(document)})


def test_written_statistics_are_read_back(file: Path) -> None:
    read = load_statistics(file)
    assert read.provenance == PROVENANCE
    assert read.sites[0].linears[0].stored == (1, 5)
    before = file.read_bytes()
    save_statistics(read, file)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d.update(provenance=5), "provenance is 5, not an object"),
        (lambda d, t: d["provenance"].update(tokens="x"), "provenance.tokens is 'x', not int"),
        (lambda d, t: d["provenance"].update(threshold=float("nan")), "provenance.threshold is nan"),
        (lambda d, t: d["provenance"].pop("seed"), "provenance has no field 'seed'"),
        (lambda d, t: d["sites"].append(None), r"sites\[1\] is None, not an object"),
        (lambda d, t: d["sites"][0].update(kind="new"), r"sites\[0\]\.kind is 'new', not one of"),
        (lambda d, t: d["sites"][0].update(layer=-1), r"sites\[0\]\.layer is -1"),
        (lambda d, t: d["sites"][0].update(linears={}), r"sites\[0\]\.linears is \{\}, not a list"),
        (lambda d, t: d["sites"][0]["linears"][0].update(stored=5), r"linears\[0\]\.stored is 5, not a list"),
        (
            lambda d, t: d["sites"][0]["linears"][0].update(stored=[8]),
            r"linears\[0\]\.stored \[8\] are not all among 8",
        ),
        (lambda d, t: d["sites"][0]["linears"][0].update(in_features=9), r"linears\[0\] h\.0\.q has 9 inputs"),
        (lambda d, t: d["sites"][0]["linears"][0].update(more=1), "unknown field 'more'"),
        (lambda d, t: d.update(schema=5), "schema is 5, not str"),
        (lambda d, t: t.update({"h.0.input.maximum": torch.zeros(7)}), "h.0.input.maximum has 7 values, not 8"),
        (lambda d, t: t.update({"h.0.input.minimum": torch.zeros(2, 4)}), r"has the shape \[2, 4\], not one dimension"),
        (lambda d, t: t.pop("h.0.q.weight_error"), "is not a file of outlier statistics"),
    ],
)
def test_changes_are_named(change: Callable[[Any, dict[str, torch.Tensor]], object], message: str, file: Path) -> None:
    rewritten(file, change)
    with pytest.raises(CheckpointError, match=message):
        load_statistics(file)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"schema": "int8cli.outlier-statistics/9"}'])
def test_a_document_of_another_kind_is_refused(text: str, file: Path) -> None:
    save_file({"x": torch.zeros(1)}, file, metadata={"int8cli": text})
    with pytest.raises(CheckpointError, match=r"statistics\.safetensors"):
        load_statistics(file)


def test_a_pipe_that_nobody_writes_to_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_statistics(tmp_path / "pipe")


def figure(name: str, value: float) -> Callable[[Any, dict[str, torch.Tensor]], object]:
    """Sets the first value of a tensor."""

    def change(document: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (figure("h.0.q.weight_error", -1.0), "h.0.q.weight_error has negative numbers"),
        (figure("h.0.q.weight_error", float("nan")), "h.0.q.weight_error is not made of finite numbers"),
        (figure("h.0.input.mean_square", float("inf")), "h.0.input.mean_square is not made of finite numbers"),
        (figure("h.0.input.absmax_position", -1), "h.0.input.absmax_position has negative numbers"),
        (
            lambda d, t: t.update({"h.0.input.mean_square": t["h.0.input.mean_square"].double()}),
            "h.0.input.mean_square is not made of finite numbers",
        ),
        (
            lambda d, t: d["sites"][0]["linears"][0].update(weight_sum_squares=float("inf")),
            r"sites\[0\].linears\[0\].weight_sum_squares is inf",
        ),
        (lambda d, t: d["sites"][0].update(mean_squared_rowmax=float("inf")), r"sites\[0\].mean_squared_rowmax is inf"),
    ],
)
def test_figures_that_cannot_be_are_refused(
    change: Callable[[Any, dict[str, torch.Tensor]], object], message: str, file: Path
) -> None:
    rewritten(file, change)
    with pytest.raises(CheckpointError, match=message):
        load_statistics(file)


def test_the_mean_square_of_the_largest_inputs_is_finite(file: Path) -> None:
    inputs = InputStatistics(2)
    inputs.update(torch.full((1, 3, 2), torch.finfo(torch.float32).max))
    assert bool(torch.isfinite(inputs.summary().mean_square).all())
