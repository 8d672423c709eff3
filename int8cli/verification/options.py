"""With what a verification is made.

Owns nothing but the data; needs no torch, so that whoever only reads and compares digests does not import it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VerificationRun:
    """With how many threads to read, and with what to convert once more; nothing here changes a result."""

    threads: int
    device: str = "cpu"
