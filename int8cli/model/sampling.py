"""How much of a text the model is run on.

Owns the defaults. Needs no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """How many tokens of a text to use, in sequences of what length, and which."""

    tokens: int = 4096
    sequence_length: int = 512
    seed: int = 0
