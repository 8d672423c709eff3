"""The options of a verification.

Needs no torch, so that a verification that only compares digests does not import it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VerificationRun:
    """The number of threads to read and convert with, and the device to convert on. Neither changes the result."""

    threads: int
    device: str = "cpu"
