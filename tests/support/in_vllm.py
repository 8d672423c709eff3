"""vLLM in a process of its own, tiny models that its CPU build runs, and how its answers on two of them compare."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from int8cli import ConvertOptions, convert
from int8cli.results.conversion import ConversionReport
from support.checkpoints import Tiny, build_tiny

# vLLM's attention wants heads of 32 at least.
VOCABULARY = 320
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {**LLAMA, "head_dim": 32}
OWN_HEADS = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
SEQUENCES = torch.randint(3, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(1)).tolist()


def saved_and_converted(
    tiny: Tiny, directory: Path, *, skip: tuple[str, ...] = (), fused: bool = False
) -> tuple[Path, Path, ConversionReport]:
    """A model as transformers saves it, and as int8cli converts it. `fused`: experts saved as transformers has them."""
    source, output = directory / "source", directory / "int8"
    build_tiny(tiny).save_pretrained(source, **({"save_original_format": False} if fused else {}))
    options = ConvertOptions(outliers="none", layout="compressed-tensors", skip=skip)
    return source, output, convert(source, output, options).report


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The median over positions of ‖found - expected‖ / ‖expected - its mean‖, of log-probabilities.

    The mean is taken out since it says only how large the vocabulary is. The median, since a router that chooses
    another expert changes one position much.
    """
    spread = (expected - expected.mean(dim=1, keepdim=True)).norm(dim=1)
    return float(((found - expected).norm(dim=1) / spread).median())


def same_top(found: Tensor, expected: Tensor) -> float:
    """The share of positions at which the most likely token is the same."""
    return float((found.argmax(1) == expected.argmax(1)).float().mean())


CLIENT = Path(__file__).parents[1] / "vllm" / "client.py"


@dataclass(frozen=True)
class Opened:
    """What vLLM made of a model: log-probabilities (positions, tokens), and the class that computes each layer."""

    logprobs: Tensor
    layers: dict[str, str]


class Vllm:
    """The process, which is started when it is first asked, and again if it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(CLIENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        return self._process

    def open(
        self,
        model: Path,
        sequences: Sequence[Sequence[int]],
        *,
        every_token: bool = True,
        experts: Path | None = None,
    ) -> Opened:
        """The log-probabilities of all tokens at each position but the first, or only of the token that is there.

        Raises RuntimeError with vLLM's own error.
        """
        asked = {
            "model": str(model),
            "sequences": sequences,
            "every_token": every_token,
            "experts": None if experts is None else str(experts),
        }
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(asked), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM's process ended with {process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return Opened(torch.tensor(answer["logprobs"]), answer["layers"])

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate(timeout=60)
