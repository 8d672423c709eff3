"""The small files that transformers reads from a directory: config and tokenizer."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from int8cli.checkpoint.source import Source
from int8cli.checkpoint.weight_files import WeightFiles

_CONFIG = "config.json"
_LIMIT_BYTES = 100_000_000


@contextmanager
def model_files(source: Source, weights: WeightFiles) -> Iterator[Path]:
    """A temporary directory with the source's config and tokenizer, but without its Python files."""
    names = [name for name in weights.copied if "/" not in name and not name.endswith(".py")]
    if _CONFIG in source.list_files():
        names.append(_CONFIG)
    with tempfile.TemporaryDirectory(prefix="int8cli-") as temporary:
        directory = Path(temporary)
        for name in names:
            if source.size_bytes(name) <= _LIMIT_BYTES:
                with source.fetch(name) as local:
                    # A hard link would be quicker, and would change the time that tells of changes of the source.
                    shutil.copyfile(local.path, directory / name)
        yield directory
