"""A real model: vLLM's perplexity of a conversion is the one that `evaluate` computes for it."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.in_vllm import Vllm
from transformers import AutoConfig

from int8cli import ConvertOptions, EvaluateOptions, InspectOptions, convert, evaluate, inspect_outliers
from int8cli.commands.options import InputsName
from int8cli.data import HELD_OUT_NAME, held_out_text
from int8cli.model.sampling import Sampling
from int8cli.model.text import Text, sequences_of
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.outliers.statistics_file import save_statistics

MAKE = Path(__file__).parents[2] / "scripts" / "make_demo_model.py"
SEQUENCES, LENGTH = 4, 512
# In nats: of two implementations of the same arithmetic, whose inputs differ by bfloat16's rounding.
NOISE = 0.003
METHODS: dict[InputsName, str] = {
    "absmax": "smoothed-vector-wise",
    "zeropoint": "smoothed-zeropoint-inputs",
    "none": "smoothed-int8-weights",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in bfloat16."""
    directory: Path = tmp_path_factory.mktemp("demo") / "SmolLM2"
    subprocess.run([sys.executable, str(MAKE), str(directory)], check=True)
    return directory


def test_perplexity_in_vllm_is_that_of_evaluate(model: Path, vllm: Vllm, tmp_path: Path) -> None:
    statistics = inspect_outliers(model, InspectOptions(tokens=2048, smooth=True))
    assert isinstance(statistics, OutlierStatistics)
    save_statistics(statistics, tmp_path / "statistics.safetensors")
    options = EvaluateOptions(
        methods=tuple(METHODS.values()),
        tokens=SEQUENCES * LENGTH,
        sequence_length=LENGTH,
        outliers=tmp_path / "statistics.safetensors",
    )
    evaluated = {each.key: each.scores.nats for each in evaluate(model, options).methods}
    sampling = Sampling(options.tokens, options.sequence_length, options.seed)
    text = Text.decode(HELD_OUT_NAME, held_out_text())
    inputs = sequences_of(text, model, AutoConfig.from_pretrained(model), sampling)
    ids = [each["input_ids"].flatten().tolist() for each in inputs]
    found = {}
    for each, method in METHODS.items():
        choice = ConvertOptions(
            outliers="none", smooth=options.outliers, layout="compressed-tensors", inputs=each, figures=False
        )
        output = convert(model, tmp_path / each, choice).output
        opened = vllm.open(output, ids, dtype="bfloat16", every_token=False)
        found[method] = -float(opened.logprobs.mean())
        print(f"{method}: {found[method]:.4f} nats in vLLM, {evaluated[method]:.4f} by evaluate")
    assert found == pytest.approx({method: evaluated[method] for method in found}, abs=NOISE)
