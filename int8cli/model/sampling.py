"""How much of a text a model is run on. Owns the defaults. Needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """How many tokens of a text to use, the length of the sequences, and the seed that chooses them."""

    tokens: int = 4096
    sequence_length: int = 512
    seed: int = 0
