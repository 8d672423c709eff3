"""What `generate` produced and how fast, as plain objects with a JSON form. Needs no torch."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

GENERATION_SCHEMA = "int8cli.generation/1"
Stopped = Literal["end", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the 16-bit model says to the same prompt.

    `first_difference` is the first new token, counted from 0, at which the two texts part; None where they do not.
    `agreeing_tokens`: at so many of the int8 model's tokens the 16-bit model, given the same tokens before, would have
    chosen the same one. `weights_bytes` is what its weights take in memory.
    """

    source: str
    text: str
    new_tokens: int
    first_difference: int | None
    agreeing_tokens: int
    tokens_per_second: float | None
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Generation:
    """A continuation of a prompt. Times in seconds, from the call on; the model was loaded before.

    `stopped` is "end" where the model ended its text, "length" where the limit did, "interrupted" where the caller did.
    Only then there may be no token at all: `seconds_to_first_token` is None. `seconds` is the time to the last token.
    `tokens_per_second` is that of the tokens after the first, None where there was one alone. `peak_memory_bytes` is
    the process's largest resident memory so far, `peak_gpu_bytes` that of the GPU, None without one.
    """

    model: str
    prompt_tokens: int
    text: str
    new_tokens: int
    stopped: Stopped
    seconds_to_first_token: float | None
    seconds: float
    tokens_per_second: float | None
    weights_bytes: int
    peak_memory_bytes: int | None
    peak_gpu_bytes: int | None
    device: str
    agreement: Agreement | None = None

    def to_json(self) -> dict[str, Any]:
        return {"schema": GENERATION_SCHEMA, **asdict(self)}
