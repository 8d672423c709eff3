"""Verification in the process of the test."""

from pathlib import Path

from int8cli import VerifyOptions, verify
from int8cli.results.verification import Verification


def verified(directory: Path, source: Path | None = None) -> Verification:
    """Every check of a directory and, with a source, of what it becomes."""
    _import_loaders()
    return verify(directory, VerifyOptions(source, threads=2))


def _import_loaders() -> None:
    """What is imported is used here, where each verification would take seconds in a process of its own."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import compressed_tensors  # noqa: F401
    import transformers  # noqa: F401
