"""vLLM in a process of its own, tiny models that its CPU build runs, and how its answers compare with torch's.

Both compute in float32, so that nothing but the int8 arithmetic rounds much: they agree to the fifth digit.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from int8cli import ConvertOptions, convert, load_model
from int8cli.commands.options import InputsName
from int8cli.llm_int8.matmul import InputScheme
from support.checkpoints import Tiny, build_tiny

# The largest errors of log-probabilities, as medians over positions: of vLLM against torch, which compute the same; and
# of int8 against floats, which only shows that the two are the same model.
SAME, LOST = 1e-4, 0.05
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


def saved(tiny: Tiny, directory: Path, *, fused: bool = False) -> Path:
    """A model as transformers saves it. `fused`: with its experts as transformers has them in memory.

    In float32: of values in bfloat16, many lie just between two int8 values, and the last bit decides. The bias of a
    router, which vLLM's CPU build leaves out, is 0.
    """
    model = build_tiny(tiny, torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(".e_score_correction_bias"):
            parameter.data.zero_()
    model.save_pretrained(directory, **({"save_original_format": False} if fused else {}))
    return directory


def converted(source: Path, output: Path, inputs: InputsName = "absmax") -> Path:
    convert(source, output, ConvertOptions(outliers="none", layout="compressed-tensors", inputs=inputs))
    return output


def in_torch(output: Path, inputs: InputsName = "absmax") -> Tensor:
    """What `Vllm.open` gives for the SEQUENCES, computed by transformers' model around int8cli's int8 layers.

    `inputs` are those of the conversion; for "none", the int8 weights times their scales are used as floats.
    """
    scheme: InputScheme = "absmax" if inputs == "none" else inputs
    model = load_model(output, inputs=scheme, device="cpu", dtype=torch.float32)
    if inputs == "none":
        model.dequantize()
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, :-1] for ids in SEQUENCES]
    return torch.cat(logits).log_softmax(dim=-1)


@dataclass(frozen=True)
class RelativeError:
    """‖found - expected‖ / ‖expected - its mean‖ of log-probabilities, over positions.

    The mean is taken out since it says only how large the vocabulary is.
    """

    median: float
    largest: float

    def __str__(self) -> str:
        return f"{self.median:.1e} (at most {self.largest:.1e})"


def relative_error(found: Tensor, expected: Tensor) -> RelativeError:
    """Both are (positions, tokens)."""
    spread = (expected - expected.mean(dim=1, keepdim=True)).norm(dim=1)
    errors = (found - expected).norm(dim=1) / spread
    return RelativeError(float(errors.median()), float(errors.max()))


CLIENT = Path(__file__).parents[1] / "vllm" / "client.py"


@dataclass(frozen=True)
class Opened:
    """What vLLM made of a model: log-probabilities (positions, tokens), and the class that computes each layer.

    `ids` are the tokens of the sequences, with those that stand for a picture.
    """

    logprobs: Tensor
    layers: dict[str, str]
    ids: list[list[int]]


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
        sequences: Sequence[Sequence[int]] | Sequence[str],
        *,
        dtype: str = "float32",
        every_token: bool = True,
        experts: Path | None = None,
        picture: Path | None = None,
    ) -> Opened:
        """The log-probabilities of all tokens at each position but the first, or only of the token that is there.

        With a picture, the sequences are texts, each with a mark for it.
        Raises RuntimeError with vLLM's own error.
        """
        asked = {
            "model": str(model),
            "sequences": sequences,
            "dtype": dtype,
            "every_token": every_token,
            "experts": None if experts is None else str(experts),
            "picture": None if picture is None else str(picture),
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
        return Opened(torch.tensor(answer["logprobs"]), answer["layers"], answer["ids"])

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate(timeout=60)
