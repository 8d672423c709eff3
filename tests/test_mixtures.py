"""What is said about a mixture of experts, before, after and without converting it."""

import json
from pathlib import Path

import pytest
from support.checkpoints import save_tiny
from support.program import Nursery, llama

from int8cli.planning.layouts import LAYOUTS

BETTER = "The compressed-tensors layout, for vLLM and load_model: "


def test_convert_says_first_and_last_what_stays_float_and_which_layout_does_better(
    nursery: Nursery, tmp_path: Path
) -> None:
    save_tiny("mixtral", tmp_path / "source")
    outcome = nursery.run("convert", "source", "-o", "out", "--outliers", "none", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    first = outcome.err.splitlines()[:2]
    assert "% of the parameters are experts, which this layout leaves in floats" in first[1]
    report = json.loads((tmp_path / "out" / "int8" / "report.json").read_text())
    percent = f"{report['totals']['percent_quantized']:.1f} % become int8"
    assert percent in first[1]
    assert BETTER in first[1]
    assert percent in " ".join(outcome.out.split())
    assert BETTER in " ".join(outcome.out.split())


def test_nothing_is_said_where_experts_are_int8_or_absent(nursery: Nursery, tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "mixture")
    llama(tmp_path / "dense")
    for source, layout in (("mixture", "compressed-tensors"), ("dense", "bitsandbytes")):
        outcome = nursery.run(
            "convert", source, "-o", f"{source}-8", "--outliers", "none", "--layout", layout, cwd=tmp_path
        )
        assert outcome.code == 0, outcome.err
        assert "experts, which this layout leaves" not in outcome.err + outcome.out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_estimate_memory_shows_each_layout_as_it_would_be_written(
    layout: str, nursery: Nursery, tmp_path: Path
) -> None:
    save_tiny("qwen3_moe", tmp_path / "source")
    outcome = nursery.run("estimate-memory", "source", "--json", "--layout", layout, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    shown = json.loads(outcome.out)["layouts"]
    assert [share["layout"] for share in shown] == [layout, *(name for name in LAYOUTS if name != layout)]
    for share in shown:
        out = f"out-{share['layout']}"
        done = nursery.run(
            "convert", "source", "-o", out, "--outliers", "none", "--layout", share["layout"], cwd=tmp_path
        )
        assert done.code == 0, done.err
        totals = json.loads((tmp_path / out / "int8" / "report.json").read_text())["totals"]
        assert share["output_bytes"] == totals["output_bytes"]
        assert share["percent_int8"] == pytest.approx(totals["percent_quantized"])
    terminal = nursery.run("estimate-memory", "source", cwd=tmp_path)
    assert all(f"in the {name} layout:" in terminal.out for name in LAYOUTS)


def test_estimate_memory_of_a_dense_model_has_no_layouts(nursery: Nursery, tmp_path: Path) -> None:
    llama(tmp_path / "source")
    outcome = nursery.run("estimate-memory", "source", "--json", cwd=tmp_path)
    assert json.loads(outcome.out)["layouts"] == []
