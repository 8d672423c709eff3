"""The small files that transformers wants to find in a directory: config and tokenizer."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from int8cli.checkpoint.index import WeightFiles
from int8cli.checkpoint.source import Source

_CONFIG = "config.json"
_LIMIT_BYTES = 100_000_000


@contextmanager
def model_files(source: Source, weights: WeightFiles) -> Iterator[Path]:
    """A directory with the source's config and tokenizer while the context lasts. Python files are left out."""
    wanted = [name for name in weights.copied if "/" not in name and not name.endswith(".py")]
    if _CONFIG in source.list_files():
        wanted.append(_CONFIG)
    with tempfile.TemporaryDirectory(prefix="int8cli-") as name:
        directory = Path(name)
        for file in wanted:
            if source.size_bytes(file) <= _LIMIT_BYTES:
                with source.fetch(file) as local:
                    _put(local.path, directory / file)
        yield directory


def _put(original: Path, place: Path) -> None:
    try:
        os.link(original.resolve(), place)
    except OSError:  # another disk
        shutil.copyfile(original, place)
