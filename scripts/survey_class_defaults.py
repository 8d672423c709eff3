"""Find out of which configuration classes int8cli knows what they put in the place of an absent field.

Each field that matters for the KV cache is taken out of each class's config: in its default size, with twice the heads,
and with twice the width. The size that int8cli then reads is compared with that of the config as its class completes
it. Prints the lists in int8cli/loaders/class_defaults.py: the families whose silence is understood, by what it is on.

    python scripts/survey_class_defaults.py                 half a minute, no weights, no network
    python scripts/survey_class_defaults.py --differences   what was not understood, field by field

Needs the development extras (transformers).
"""

import argparse
import json
import os
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported; some configs ask the Hub for another one

from transformers import CONFIG_MAPPING

from int8cli.estimate.config_fields import HEAD_WIDTH, KEY_VALUE_HEADS, NESTED
from int8cli.estimate.kv_cache import read_kv_cache
from int8cli.loaders.config_class import described

WIDTHS = frozenset({*HEAD_WIDTH, "v_head_dim"})
HEADS = frozenset({*KEY_VALUE_HEADS, "multi_query", "new_decoder_architecture"})
KINDS = frozenset(
    (
        *("layer_types", "layers_block_type", "hybrid_override_pattern", "sliding_window", "use_sliding_window"),
        *("max_window_layers", "sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval"),
        *("attention_chunk_size", "num_kv_shared_layers", "attn_layer_period", "attn_layer_offset"),
        "no_rope_layer_interval",
    )
)
HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_head", "n_heads")
MODEL_WIDTHS = ("hidden_size", "d_model", "n_embd")
TOKENS = 20_000  # longer than the windows


def places(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field of a config that matters, and of those inside it that describe a language model."""
    for name, value in config.items():
        if name in WIDTHS | HEADS | KINDS:
            yield (*path, name)
        elif isinstance(value, dict) and name in NESTED:
            yield from places(value, (*path, name))


def without(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    first, *rest = path
    if not rest:
        return {name: value for name, value in config.items() if name != first}
    return config | {first: without(config[first], tuple(rest))}


def grown(config: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """With these numbers twice as large, so that numbers which agree by chance no longer do."""
    inside = {name: grown(value, names) for name, value in config.items() if name in NESTED and isinstance(value, dict)}
    return {k: 2 * v if k in names and type(v) is int else v for k, v in config.items()} | inside


def as_json(found: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(found, default=str))


def size(config: dict[str, Any]) -> int | None:
    found = read_kv_cache(config).layer_bytes(TOKENS, 1, 2)
    return None if found is None else sum(found)


def differences(model_type: str) -> Iterator[tuple[str, int | None, int | None]]:
    """(field, size as read without it, size as its class completes it), for each field that is not understood."""
    config_class = CONFIG_MAPPING[model_type]
    full = as_json(config_class().to_dict())
    for config in (full, grown(full, HEAD_COUNTS), grown(full, MODEL_WIDTHS)):
        if not size(config):
            yield "all", size(config), None
        for path in places(config):
            less = without(config, path)
            try:
                completed = size(as_json(described(config_class.from_dict(less))))
            except Exception:
                completed = size(less)  # the class needs the field: no such config can be, and none differs
            if (read := size(less)) not in (completed, None):
                yield ".".join(path), read, completed


def main() -> None:
    parser = argparse.ArgumentParser(description="Of which configuration classes the defaults are known.")
    parser.add_argument("--differences", action="store_true", help="print each, not the lists")
    options = parser.parse_args()
    silence: dict[str, list[str]] = {}
    for model_type in sorted(CONFIG_MAPPING.keys()):
        try:
            found = list(differences(model_type))
        except Exception as error:
            print(f"# {model_type}: {type(error).__name__}")
            continue
        if options.differences:
            for place, read, completed in found:
                print(model_type, place, read, completed)
        if found and found[0][0] == "all":
            continue
        leaves = {place.rpartition(".")[2] for place, _, _ in found}
        aspects = {"widths": WIDTHS, "heads": HEADS, "kinds": KINDS}
        understood = [name for name, fields in aspects.items() if not leaves & fields]
        silence.setdefault(" and ".join(understood) or "nothing", []).append(model_type)
    for understood_of, names in silence.items():
        print(f"{understood_of}:", " ".join(names))


if __name__ == "__main__":
    main()
