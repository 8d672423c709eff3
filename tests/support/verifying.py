"""Verification inside the process of the test."""

from pathlib import Path

from int8cli import VerifyOptions, verify
from int8cli.results.verification import Verification


def verified(directory: Path, source: Path | None = None) -> Verification:
    """Every check of a directory and, with a source, of what it becomes."""
    _import_loaders()
    return verify(directory, VerifyOptions(source, threads=2))


def _import_loaders() -> None:
    """Import the loaders once, so that verifications run in this process and not in separate ones that take seconds."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import compressed_tensors  # noqa: F401
    import transformers  # noqa: F401
