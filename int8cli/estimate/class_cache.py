"""The KV cache of a checkpoint: by its headers and config.json, and by the config's class for what these leave open.

Owns when the class is asked, and what is said where it does not answer. A size that would be a guess is not given.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from int8cli.estimate.asking import ConfigClass
from int8cli.estimate.key_value_rows import RowsByLayer
from int8cli.estimate.kv_cache import KvCache, read_kv_cache
from int8cli.loaders.config_class import NoConfigClassError


def kv_cache_of(config: Mapping[str, Any], rows: RowsByLayer, config_class: ConfigClass) -> KvCache:
    """The cache, with the class asked if something that only it knows matters."""
    found = read_kv_cache(config, rows)
    if not found.assumed and not found.answerable:
        return found
    try:
        return read_kv_cache(config_class.completed(), rows)
    except NoConfigClassError as error:
        reason = found.reason if found.layers is None else f"config.json has no {' or '.join(found.assumed)}"
        return replace(found, layers=None, reason=f"{reason}; {error}")
