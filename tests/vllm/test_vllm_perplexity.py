"""A real model: vLLM's perplexity of a conversion is the one that `evaluate` computes for it."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from support.in_vllm import Vllm
from support.vllm_perplexity import Amount, compared, converted_for_vllm

from int8cli import InspectOptions, inspect_outliers
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.outliers.statistics_file import save_statistics

ROOT = Path(__file__).parents[2]
MADE = ROOT / "demo" / "SmolLM2-135M-Instruct"
AMOUNT = Amount(sequences=2, length=512)
# In nats: of two implementations of the same arithmetic, whose inputs differ by bfloat16's rounding. On these 1,024
# tokens 16 bit differs by 0.0016, int8 by 0.0036 to 0.0062; on 16 times as many by 0.001.
NOISE = 0.01


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in bfloat16: what `make demo` made, if it did."""
    if (MADE / "config.json").is_file():
        return MADE
    directory: Path = tmp_path_factory.mktemp("demo") / "SmolLM2"
    subprocess.run([sys.executable, str(ROOT / "scripts" / "make_demo_model.py"), str(directory)], check=True)
    return directory


def test_perplexity_in_vllm_is_that_of_evaluate(model: Path, vllm: Vllm, tmp_path: Path) -> None:
    found = inspect_outliers(model, InspectOptions(tokens=AMOUNT.length, smooth=True))
    assert isinstance(found, OutlierStatistics)
    smooth = tmp_path / "statistics.safetensors"
    save_statistics(found, smooth)
    outputs = converted_for_vllm(model, tmp_path, smooth)
    for method, both in compared(model, outputs, AMOUNT, vllm).items():
        nats, evaluated = statistics.fmean(both.vllm), statistics.fmean(both.evaluate)
        print(f"{method}: {nats:.4f} nats in vLLM, {evaluated:.4f} by evaluate")
        assert nats == pytest.approx(evaluated, abs=NOISE)
