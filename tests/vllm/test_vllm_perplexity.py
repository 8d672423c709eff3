"""A real model: vLLM's perplexity of a conversion is the one that `evaluate` computes for it."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.in_vllm import Vllm
from transformers import AutoConfig

from int8cli import ConvertOptions, EvaluateOptions, InspectOptions, convert, evaluate, inspect_outliers
from int8cli.commands.options import InputsName, LayoutName
from int8cli.data import HELD_OUT_NAME, held_out_text
from int8cli.model.sampling import Sampling
from int8cli.model.text import Text, sequences_of
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.outliers.statistics_file import save_statistics
from int8cli.results.evaluation import REFERENCE

ROOT = Path(__file__).parents[2]
MADE = ROOT / "demo" / "SmolLM2-135M-Instruct"
SEQUENCES, LENGTH = 2, 512
# In nats: of two implementations of the same arithmetic, whose inputs differ by bfloat16's rounding. On these 1,024
# tokens 16 bit differs by 0.0016, int8 by 0.0036 to 0.0062.
NOISE = 0.01
# What vLLM computes, by its name in `evaluate`.
METHODS: dict[InputsName, str] = {
    "absmax": "vector-wise",
    "zeropoint": "zeropoint-inputs",
    "none": "int8-weights",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in bfloat16: what `make demo` made, if it did."""
    if (MADE / "config.json").is_file():
        return MADE
    directory: Path = tmp_path_factory.mktemp("demo") / "SmolLM2"
    subprocess.run([sys.executable, str(ROOT / "scripts" / "make_demo_model.py"), str(directory)], check=True)
    return directory


def test_perplexity_in_vllm_is_that_of_evaluate(model: Path, vllm: Vllm, tmp_path: Path) -> None:
    statistics = inspect_outliers(model, InspectOptions(tokens=LENGTH, smooth=True))
    assert isinstance(statistics, OutlierStatistics)
    smooth = tmp_path / "statistics.safetensors"
    save_statistics(statistics, smooth)
    for inputs in METHODS:
        layout: LayoutName = "compressed-tensors"
        options = ConvertOptions(outliers="none", smooth=smooth, layout=layout, inputs=inputs, figures=False)
        convert(model, tmp_path / inputs, options)
    evaluated = nats_by_evaluate(tmp_path / "absmax", model)  # the others have the same int8 weights
    ids = tokens_of(model)
    found = {REFERENCE: nats_in_vllm(model, ids, vllm)}
    found |= {method: nats_in_vllm(tmp_path / inputs, ids, vllm) for inputs, method in METHODS.items()}
    for method, nats in found.items():
        print(f"{method}: {nats:.4f} nats in vLLM, {evaluated[method]:.4f} by evaluate")
    assert found == pytest.approx(evaluated, abs=NOISE)


def nats_by_evaluate(output: Path, model: Path) -> dict[str, float]:
    methods = tuple(METHODS.values())
    tokens = SEQUENCES * LENGTH
    options = EvaluateOptions(methods=methods, tokens=tokens, sequence_length=LENGTH, source=model)
    return {each.key: each.scores.nats for each in evaluate(output, options).methods if each.scores is not None}


def tokens_of(model: Path) -> list[list[int]]:
    """The sequences that `evaluate` runs."""
    text = Text.decode(HELD_OUT_NAME, held_out_text())
    sampling = Sampling(SEQUENCES * LENGTH, LENGTH, EvaluateOptions().seed)
    inputs = sequences_of(text, model, AutoConfig.from_pretrained(model), sampling)
    return [each["input_ids"].flatten().tolist() for each in inputs]


def nats_in_vllm(directory: Path, ids: list[list[int]], vllm: Vllm) -> float:
    return -float(vllm.open(directory, ids, dtype="bfloat16", every_token=False).logprobs.mean())
