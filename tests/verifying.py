"""Verification as the command does it, in the process of the test."""

from pathlib import Path

from int8cli.checkpoint.locate import open_source
from int8cli.results.verification import Verification
from int8cli.verify import VerifyObserver, VerifyOptions, verify


def verified(directory: Path, source: Path | None = None) -> Verification:
    """Every check of a directory and, with a source, of what it becomes."""
    _import_loaders()
    if source is None:
        return verify(directory, None, VerifyOptions(threads=2), VerifyObserver())
    opened = open_source(str(source), revision=None, download_dir=directory / "int8" / "incoming")
    try:
        return verify(directory, opened, VerifyOptions(threads=2), VerifyObserver())
    finally:
        opened.close()


def _import_loaders() -> None:
    """What is imported is used here, where each verification would take seconds in a process of its own."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import compressed_tensors  # noqa: F401
    import transformers  # noqa: F401
