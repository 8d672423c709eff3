"""Measure the benefit of stored columns: size, perplexity and output error, compared with bitsandbytes.

    python scripts/measure_decomposition.py demo/SmolLM2-135M-Instruct

Uses the model, and a copy with outliers planted in six dimensions (times 256, which is the same function in floats).
Converts each with several numbers of stored columns, and runs the results on a text that was not used for calibration.
Prints for each method: the bytes over plain int8; the difference of the mean negative log-likelihood from the float
model, and the divergence from its predictions, in nats per token with standard errors; and the mean relative output
error of all int8 layers on the float model's inputs. Needs the extra `calibrate`. The line for bitsandbytes needs
bitsandbytes, whose loader uses bfloat16 for everything that is not int8, while the others use float32.
`--columns 8 --sequences 2 --length 256` takes 200 s of CPU time.
"""

import argparse
import math
import pydoc_data.topics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure_outliers import plant
from torch import Tensor

import int8cli
from int8cli.runtime.linear import Int8Linear

SCALE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--columns", type=int, nargs="+", default=[0, 4, 8, 10])
    parser.add_argument("--text", type=Path, help="UTF-8 text to evaluate on; by default Python's help topics")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    sequences = read_sequences(arguments.model, arguments.text, arguments.sequences, arguments.length)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        measure("the original model", arguments.model, sequences, arguments.columns, work / "plain")
        planted = plant(arguments.model, work / "model", SCALE)
        measure(f"six dimensions times {SCALE}", planted, sequences, arguments.columns, work / "planted")


def read_sequences(model: Path, text: Path | None, count: int, length: int) -> Tensor:
    """Token ids (count, length) of sequences that are evenly spaced in the text."""
    from transformers import AutoTokenizer

    topics = pydoc_data.topics.topics
    words = text.read_text() if text else "\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(words, verbose=False)["input_ids"])
    pieces = ids[: len(ids) // length * length].view(-1, length)
    if len(pieces) < count:
        sys.exit(f"the text has {len(pieces)} sequences of {length} tokens")
    return pieces[torch.linspace(0, len(pieces) - 1, count).long()]


def measure(title: str, model: Path, sequences: Tensor, columns: list[int], work: Path) -> None:
    """Print the table of one model."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = list(log_probabilities(reference, sequences))
    perplexity = math.exp(float(losses(expected, sequences).mean()))
    print(f"{title}: perplexity in float {perplexity:.2f}, {sequences.numel():,} tokens", flush=True)
    directories = {count: convert(model, work / str(count), count) for count in sorted({0, *columns})}
    plain_bytes = size_bytes(directories[0])
    for name, directory, quantized in subjects(directories):
        more = size_bytes(directory) / plain_bytes - 1
        loss, divergence = compare(expected, quantized, sequences)
        error = mean_output_error(reference, quantized, sequences[:1])
        print(f"  {name:32} bytes {more:+6.2%}  loss {loss}  divergence {divergence}  error {error:.4f}", flush=True)


def convert(model: Path, output: Path, columns: int) -> Path:
    chosen = ["--outliers", "activations", "--outlier-columns", str(columns)] if columns else ["--outliers", "none"]
    command = [sys.executable, "-m", "int8cli", "convert", str(model), "--output", str(output), "--quiet", *chosen]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return output


def size_bytes(directory: Path) -> int:
    """The weights and the stored columns, without records and reports."""
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))


def subjects(directories: dict[int, Path]) -> Iterator[tuple[str, Path, Any]]:
    """Every method: its name, the directory it needs, the model."""
    from transformers import AutoModelForCausalLM

    try:
        yield "bitsandbytes", directories[0], AutoModelForCausalLM.from_pretrained(directories[0], dtype=torch.float32)
    except ImportError as error:
        print(f"  bitsandbytes: {error}")
    for count, directory in directories.items():
        for inputs in ("absmax", "zeropoint"):
            quantized = int8cli.load_model(directory, inputs=inputs, device="cpu", dtype=torch.float32)
            yield f"{count} columns, {inputs}", directory, quantized


def log_probabilities(model: Any, sequences: Tensor) -> Iterator[Tensor]:
    """The predictions for all tokens of each sequence but the first: (length - 1, vocabulary)."""
    for sequence in sequences:
        with torch.no_grad():
            logits = model(sequence[None], use_cache=False).logits[0, :-1]
        yield logits.float().log_softmax(dim=-1)


def losses(predicted: list[Tensor], sequences: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first of each sequence."""
    pairs = zip(predicted, sequences, strict=True)
    return torch.cat([-given.gather(1, sequence[1:, None]).squeeze(1) for given, sequence in pairs]).double()


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over tokens and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> "Mean":
        return cls(float(values.mean()), float(values.std()) / math.sqrt(values.numel()))

    def __str__(self) -> str:
        return f"{self.value:+.4f} ± {self.error:.4f}"


def compare(expected: list[Tensor], quantized: Any, sequences: Tensor) -> tuple[Mean, Mean]:
    """The mean paired difference in loss, and the mean divergence KL(float, quantized), per token."""
    predicted = list(log_probabilities(quantized, sequences))
    divergences = [(e.exp() * (e - p)).sum(dim=-1) for e, p in zip(expected, predicted, strict=True)]
    loss = losses(predicted, sequences) - losses(expected, sequences)
    return Mean.of(loss), Mean.of(torch.cat(divergences).double())


def mean_output_error(reference: Any, quantized: Any, sequences: Tensor) -> float:
    """The mean over the int8 layers of ||y - y_float|| / ||y_float||, on the float model's inputs."""
    errors: list[float] = []

    def comparing(layer: Any) -> Any:
        def compare_outputs(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            with torch.no_grad():
                errors.append(float((layer(inputs[0]).float() - output).norm() / output.norm()))

        return compare_outputs

    handles = []
    for name, layer in quantized.named_modules():
        if isinstance(layer, Int8Linear) or type(layer).__name__ == "Linear8bitLt":
            handles.append(reference.get_submodule(name).register_forward_hook(comparing(layer)))
    with torch.no_grad():
        reference(sequences, use_cache=False)
    for handle in handles:
        handle.remove()
    return sum(errors) / len(errors)


if __name__ == "__main__":
    main()
