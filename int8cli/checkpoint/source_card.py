"""What the model card of a source says and its conversion inherits: license and task.

Owns which fields these are and which values are believed. Reads only the front matter of README.md.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from int8cli.checkpoint.source import Source
from int8cli.errors import CheckpointError

SOURCE_CARD_FILE = "README.md"
_LIMIT_BYTES = 1 << 18
_LONGEST = 300


@dataclass(frozen=True, slots=True)
class SourceCard:
    """Fields of the front matter, as https://huggingface.co/docs/hub/model-cards defines them. None: not there."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    pipeline_tag: str | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that are there."""
        known = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in known.items() if value is not None}


NO_CARD = SourceCard()


def read_source_card(source: Source) -> SourceCard:
    """The card of a source; empty without a README.md or without front matter.

    Raises CheckpointError if the front matter cannot be parsed, and what the source raises if it cannot be read.
    """
    if SOURCE_CARD_FILE not in source.list_files():
        return NO_CARD
    with source.open(SOURCE_CARD_FILE) as file:
        text = file.read(min(source.size_bytes(SOURCE_CARD_FILE), _LIMIT_BYTES)).decode(errors="replace")
    return source_card_of(text)


def source_card_of(text: str) -> SourceCard:
    """The card in the text of a README.md. Raises CheckpointError if its front matter cannot be parsed."""
    from huggingface_hub import ModelCard

    if not text.startswith("---"):
        return NO_CARD
    yaml: Any = importlib.import_module("yaml")  # a dependency of huggingface_hub, which parses cards with it
    try:
        data: Any = ModelCard(text, ignore_metadata_errors=True).data
        found = data.to_dict()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{SOURCE_CARD_FILE}: its front matter is not valid YAML") from error
    return SourceCard(**{name: _believed(found.get(name)) for name in SourceCard.__slots__})


def _believed(value: object) -> str | None:
    """A short line of text; None for anything else."""
    if isinstance(value, str) and value.isprintable() and 0 < len(value) <= _LONGEST:
        return value
    return None
