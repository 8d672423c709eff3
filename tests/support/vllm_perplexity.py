"""The mean negative log-likelihood of a text in vLLM and by `evaluate`, for the same tokens."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from int8cli import ConvertOptions, EvaluateOptions, convert, evaluate
from int8cli.commands.options import InputsName
from int8cli.data import HELD_OUT_NAME, held_out_text
from int8cli.model.sampling import Sampling
from int8cli.model.text import Text, sequences_of
from int8cli.results.evaluation import REFERENCE
from support.in_vllm import Vllm

# What vLLM computes, by its name in `evaluate`.
METHODS: Mapping[InputsName, str] = {
    "absmax": "vector-wise",
    "zeropoint": "zeropoint-inputs",
    "none": "int8-weights",
}


@dataclass(frozen=True)
class Amount:
    """How much of the held-out text is run: `sequences` of `length` tokens."""

    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


@dataclass(frozen=True)
class Compared:
    """Mean nats over all positions, and by sequence, for 16 bit (REFERENCE) or one of METHODS' values."""

    vllm: tuple[float, ...]
    evaluate: tuple[float, ...]

    @property
    def differences(self) -> tuple[float, ...]:
        return tuple(ours - other for ours, other in zip(self.vllm, self.evaluate, strict=True))


def converted_for_vllm(model: Path, directory: Path, smooth: Path | None) -> dict[InputsName, Path]:
    """A model in the compressed-tensors layout, for each kind of inputs; smoothed by the statistics of a file."""
    for inputs in METHODS:
        options = ConvertOptions(outliers="none", layout="compressed-tensors", inputs=inputs, figures=False)
        convert(model, directory / inputs, options if smooth is None else replace(options, smooth=smooth))
    return {inputs: directory / inputs for inputs in METHODS}


def compared(model: Path, outputs: Mapping[InputsName, Path], amount: Amount, vllm: Vllm) -> dict[str, Compared]:
    """What both make of a model and its conversions, in the dtype of its config.json."""
    dtype = str(AutoConfig.from_pretrained(model).dtype).removeprefix("torch.")
    by_evaluate = nats_by_evaluate(outputs["absmax"], model, amount)  # the others have the same int8 weights
    ids = tokens_of(model, amount)
    models = {REFERENCE: model} | {METHODS[inputs]: output for inputs, output in outputs.items()}
    return {
        method: Compared(nats_in_vllm(directory, ids, vllm, dtype), by_evaluate[method])
        for method, directory in models.items()
    }


def nats_by_evaluate(output: Path, model: Path, amount: Amount) -> dict[str, tuple[float, ...]]:
    options = EvaluateOptions(
        methods=tuple(METHODS.values()), tokens=amount.tokens, sequence_length=amount.length, source=model
    )
    found = evaluate(output, options).methods
    return {each.key: each.scores.nats_by_sequence for each in found if each.scores is not None}


def tokens_of(model: Path, amount: Amount) -> list[list[int]]:
    """The sequences that `evaluate` runs."""
    text = Text.decode(HELD_OUT_NAME, held_out_text())
    sampling = Sampling(amount.tokens, amount.length, EvaluateOptions().seed)
    inputs = sequences_of(text, model, AutoConfig.from_pretrained(model), sampling)
    return [each["input_ids"].flatten().tolist() for each in inputs]


def nats_in_vllm(directory: Path, ids: Sequence[Sequence[int]], vllm: Vllm, dtype: str) -> tuple[float, ...]:
    opened = vllm.open(directory, ids, dtype=dtype, every_token=False)
    by_sequence = opened.logprobs.reshape(len(ids), -1)
    return tuple((-by_sequence.mean(dim=1, dtype=by_sequence.double().dtype)).tolist())


def in_float32(model: Path, directory: Path) -> Path:
    """The same weights, which `evaluate` runs in float32 as config.json says."""
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    config.pop("torch_dtype", None)
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return directory
