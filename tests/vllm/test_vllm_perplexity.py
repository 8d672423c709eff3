"""A real model: vLLM's perplexity of a conversion is the one that `evaluate` computes for it."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.in_vllm import Vllm
from transformers import AutoConfig

from int8cli import ConvertOptions, EvaluateOptions, convert, evaluate
from int8cli.data import HELD_OUT_NAME, held_out_text
from int8cli.model.sampling import Sampling
from int8cli.model.text import Text, sequences_of

MAKE = Path(__file__).parents[2] / "scripts" / "make_demo_model.py"
SEQUENCES, LENGTH = 4, 512
# In nats: of two implementations of the same arithmetic, whose inputs differ by bfloat16's rounding.
NOISE = 0.01


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in bfloat16."""
    directory: Path = tmp_path_factory.mktemp("demo") / "SmolLM2"
    subprocess.run([sys.executable, str(MAKE), str(directory)], check=True)
    return directory


def test_perplexity_in_vllm_is_that_of_evaluate(model: Path, vllm: Vllm, tmp_path: Path) -> None:
    convert(model, tmp_path / "int8", ConvertOptions(outliers="none", layout="compressed-tensors"))
    options = EvaluateOptions(methods=("vector-wise",), tokens=SEQUENCES * LENGTH, sequence_length=LENGTH)
    evaluated = {each.key: each.scores.nats for each in evaluate(model, options).methods}
    sampling = Sampling(options.tokens, options.sequence_length, options.seed)
    text = Text.decode(HELD_OUT_NAME, held_out_text())
    inputs = sequences_of(text, model, AutoConfig.from_pretrained(model), sampling)
    ids = [each["input_ids"].flatten().tolist() for each in inputs]
    for method, directory in (("16-bit", model), ("vector-wise", tmp_path / "int8")):
        nats = -float(vllm.open(directory, ids, every_token=False).logprobs.mean())
        print(f"{method}: {nats:.4f} nats in vLLM, {evaluated[method]:.4f} by evaluate")
        assert nats == pytest.approx(evaluated[method], abs=NOISE)
