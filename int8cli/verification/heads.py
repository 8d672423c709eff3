"""Output heads in int8, found without the conversion's rules for them.

Owns two judgements: the loader's own, where it has a class for the model, and one by shapes, where it has none.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from int8cli.checkpoint.config_file import read_config
from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.disk import raise_if_of_the_system
from int8cli.errors import Int8cliError
from int8cli.records.shard_record import ShardRecord
from int8cli.results.verification import Failure

_VOCABULARY = "vocab_size"


def kept_by_loader(model: Any) -> frozenset[str]:
    """The modules of a laid out model that transformers leaves alone when it is asked for int8 and told nothing else.

    From transformers 5.0 on by its own function; before, the module that makes the logits.
    """
    try:
        from transformers.quantizers.base import get_keys_to_not_convert
    except ImportError:
        head = model.get_output_embeddings()
        return frozenset(name for name, module in model.named_modules() if head is not None and module is head)
    try:
        return frozenset(get_keys_to_not_convert(model))
    except (AttributeError, IndexError, NotImplementedError):  # a class that does not say what its head is
        return frozenset()


def heads_by_shape(directory: Path, records: Sequence[ShardRecord]) -> Iterator[Failure]:
    """The one int8 layer with a row for each token of a vocabulary, in the shape of an embedding that stays a float.

    Nothing if config.json cannot be read, which the check of the config reports.
    """
    try:
        vocabularies = frozenset(_vocabularies(read_config(DirectorySource(directory))))
    except Int8cliError as error:
        raise_if_of_the_system(error)
        return
    kinds = Counter(_kind(spec.name) for record in records for spec in record.source_tensors)
    shapes = Counter(layer.shape for record in records for layer in record.layers)
    int8 = {f"{layer.name}.weight" for record in records for layer in record.layers}
    floats = {spec.shape for record in records for spec in record.source_tensors if spec.name not in int8}
    for record in records:
        for layer in record.layers:
            rows, columns = layer.shape
            alone = kinds[_kind(f"{layer.name}.weight")] <= 1 and shapes[layer.shape] == 1
            if rows in vocabularies and rows > columns and layer.shape in floats and alone:
                yield Failure(record.files[0].file, "looks like an output head, and is in int8", layer.name)


def _kind(name: str) -> str:
    """The name without its numbers: a layer of a block has others of its kind, of which some may be floats."""
    return re.sub(r"\d+", "*", name)


def _vocabularies(config: Mapping[str, Any]) -> Iterator[int]:
    """The sizes of vocabularies in a config and in each config within."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _vocabularies(value)
        elif key.endswith(_VOCABULARY) and type(value) is int:
            yield value
