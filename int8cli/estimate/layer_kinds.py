"""The kind of cache that each layer of a language model has, by its config and model family.

Owns the patterns in which families alternate their layers: full attention, sliding windows, states. Knows the names of
config fields (see `config_fields`) but no sizes. The patterns are those of transformers' configuration classes, for
configs that are older than `layer_types`.
"""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase

from int8cli.estimate.config_fields import (
    DECODER_LAYERS,
    LAYERS,
    Fields,
    LanguageModel,
    MissingFieldError,
    UnknownCacheError,
)
from int8cli.loaders.class_defaults import KINDS, has_window_of_class, understands

FULL = "full attention"
SLIDING = "sliding window"
CHUNKED = "attention in chunks"
STATE = "state"
HYBRID = "attention and state"
IMAGE = "attention to an image alone, not counted"
NOTHING = "nothing"

# The names in transformers, and their older forms (configuration_utils.py, `_LEGACY_LAYER_TYPE_REMAP`).
_WORDS = {
    "full_attention": FULL,
    "indexed_attention": FULL,
    "attention": FULL,
    "global": FULL,
    "global_attention": FULL,
    "sliding_attention": SLIDING,
    "chunked_attention": CHUNKED,
    "linear_attention": STATE,
    "mamba": STATE,
    "mamba2": STATE,
    "conv": STATE,
    "hybrid": HYBRID,
    "mlp": NOTHING,
    "moe": NOTHING,
    "M": STATE,
    "*": FULL,
    "-": NOTHING,
    "E": NOTHING,
}
# Field names that imply another kind of cache, in the config of a model type that is not listed here.
_FOREIGN = re.compile(
    r"mamba|ssm|(^|_)conv|rwkv|recurren|linear_(?!bias)|state_size|lora_rank|retention|hyena|_mem(_|$)"
)
# The same, in the config of any model type.
_UNSUPPORTED = ("block_configs", "compress_ratios", "attention_window_size", "kv_sharing_modes")
# Patterns of layers in the words of one family, which its class translates to layer_types.
_FOREIGN_PATTERNS = ("attn_type_list", "hybrid_layer_pattern")
# What may be said of windows beside layer_types.
_WINDOW = re.compile(r"window|chunk|sliding|local_|_pattern|global_attn")

_PATTERN_FIELDS = (
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "full_attention_interval",
    "no_rope_layer_interval",
)
_MOST_LAYERS = 10_000

Kinds = tuple[str, ...]
KindOfLayer = Callable[[Fields, int], str]  # from the config and the layer's index


def layer_kinds(model: LanguageModel, blocks: int, *, decoder: bool) -> Kinds:
    """The cache kind of each layer, first to last. Raises MissingFieldError if the config is not understood.

    `blocks` are those of the checkpoint, 0 if not known. They count where the config has no number of layers.
    """
    fields = model.fields
    for name in _UNSUPPORTED:
        if fields.has(name):
            raise UnknownCacheError(f"a cache with {name} is unknown to int8cli")
    kinds = _stated_kinds(fields)
    if kinds is None:
        count = fields.number(*(DECODER_LAYERS if decoder else LAYERS), default=blocks or None)
        if count > _MOST_LAYERS:
            raise UnknownCacheError(f"{count:,} layers are implausibly many")
        kind = _kind_by_family(fields.model_type)
        kinds = tuple(kind(fields, layer) for layer in range(count))
        _assume_kinds(model)
    images = _image_layers(fields)
    kinds = tuple(IMAGE if layer in images else kind for layer, kind in enumerate(kinds))
    return _without_shared(kinds, fields)


def _image_layers(fields: Fields) -> frozenset[int]:
    """The layers that attend to an image alone. Raises UnknownCacheError if the field is no list of layers."""
    listed = fields.config.get("cross_attention_layers") or ()
    if not isinstance(listed, (list, tuple)) or any(type(layer) is not int for layer in listed):
        raise UnknownCacheError("cross_attention_layers is not a list of layers")
    return frozenset(listed)


def _assume_kinds(model: LanguageModel) -> None:
    """Write down that the config speaks of windows but does not list its layers, unless its families are understood."""
    fields = model.fields
    for name in _FOREIGN_PATTERNS:
        if fields.has(name):
            raise MissingFieldError(f"{name} instead of layer_types is unknown to int8cli")
    windowed = has_window_of_class(model.model_types)
    if understands(KINDS, model.model_types) or (windowed and "sliding_window" in fields.config):
        return
    if windowed:
        fields.assume("sliding_window")
    elif any(fields.has(name) for name in fields.config if _WINDOW.search(name)):
        fields.assume("layer_types")


def refuse_foreign(fields: Fields, known: frozenset[str]) -> None:
    """Raise UnknownCacheError if the model type is not `known` and its config implies more than attention."""
    if fields.model_type in known:
        return
    for name, value in fields.config.items():
        if value and not isinstance(value, str) and _FOREIGN.search(name):
            raise UnknownCacheError(f"{name} implies a cache that is unknown for {fields.model_type or 'this model'}")


def _stated_kinds(fields: Fields) -> Kinds | None:
    """The kinds, if the config lists them layer by layer; otherwise None."""
    words = fields.words("layer_types") or fields.words("layers_block_type")
    pattern = fields.config.get("hybrid_override_pattern")
    if words is None and isinstance(pattern, str) and pattern:
        words = tuple(pattern)
    if words is None:
        return None
    for word in words:
        if word not in _WORDS:
            raise UnknownCacheError(f"layers of the type {word!r} are unknown to int8cli")
    return tuple(_WORDS[word] for word in words)


def _kind_by_family(model_type: str) -> KindOfLayer:
    return next(kind for pattern, kind in _FAMILIES if fnmatchcase(model_type, pattern))


def _without_shared(kinds: Kinds, fields: Fields) -> Kinds:
    """The last layers of some models (gemma3n) read the cache of an earlier layer and have none of their own."""
    shared = fields.number("num_kv_shared_layers", default=0)
    return kinds[: len(kinds) - shared] + (NOTHING,) * min(shared, len(kinds))


# The kind of a layer by its index, if the config does not list the kinds.


def _always(kind: str) -> KindOfLayer:
    return lambda fields, layer: kind


def _needs_layer_types(fields: Fields, layer: int) -> str:
    raise MissingFieldError("config.json does not list its layer_types")


def _jamba(fields: Fields, layer: int) -> str:
    period, offset = fields.number("attn_layer_period", default=8), int(fields.config.get("attn_layer_offset", 4))
    return FULL if layer % period == offset else STATE


def _zamba(fields: Fields, layer: int) -> str:
    period, offset = fields.number("attn_layer_period", default=6), int(fields.config.get("attn_layer_offset", 4))
    return HYBRID if layer == 2 or (layer > 2 and (layer - 3) % period == offset) else STATE


def _bamba(fields: Fields, layer: int) -> str:
    return FULL if layer in tuple(fields.config.get("attn_layer_indices") or ()) else STATE


def _lfm2(fields: Fields, layer: int) -> str:
    listed = fields.config.get("full_attn_idxs")
    return FULL if listed is None or layer in listed else STATE


def _alternating(fields: Fields, layer: int) -> str:
    return FULL if layer % 2 else SLIDING


def _one_full_of_five(fields: Fields, layer: int) -> str:
    return SLIDING if (layer + 1) % 5 else FULL


def _one_full_of(default: int, others: str) -> KindOfLayer:
    """One layer in every N has full attention. N is from the config, or `default`."""
    return lambda fields, layer: others if (layer + 1) % fields.number(*_PATTERN_FIELDS, default=default) else FULL


def _one_full_of_four_if_windowed(fields: Fields, layer: int) -> str:
    return _one_full_of(4, SLIDING)(fields, layer) if fields.has("sliding_window") else FULL


def _smollm3(fields: Fields, layer: int) -> str:
    every = fields.number(*_PATTERN_FIELDS, default=4)
    return SLIDING if _uses_window(fields) and (layer + 1) % every == 0 else FULL


def _windowed_from_a_layer_on(fields: Fields, layer: int) -> str:
    first = int(fields.config.get("max_window_layers") or 0)
    return SLIDING if _uses_window(fields) and layer >= first else FULL


def _all_alike(fields: Fields, layer: int) -> str:
    if fields.has("sliding_window"):
        return SLIDING
    return CHUNKED if fields.has("attention_chunk_size") else FULL


def _uses_window(fields: Fields) -> bool:
    return fields.has("sliding_window") and fields.flag("use_sliding_window", default=False)


# By model type. The first pattern that matches wins.
_FAMILIES: tuple[tuple[str, KindOfLayer], ...] = (
    ("mamba", _always(STATE)),
    ("falcon_mamba", _always(STATE)),
    ("mamba2", _always(STATE)),
    ("rwkv", _always(STATE)),
    ("falcon_h1", _always(HYBRID)),
    ("jamba", _jamba),
    ("zamba", _zamba),
    ("bamba", _bamba),
    ("lfm2", _lfm2),
    ("lfm2_moe", _lfm2),
    ("granitemoehybrid", _needs_layer_types),
    ("zamba2", _needs_layer_types),
    ("nemotron_h", _needs_layer_types),
    ("gemma2", _alternating),
    ("gpt_oss", _alternating),
    ("vaultgemma", _alternating),
    ("gemma3n*", _one_full_of_five),
    ("gemma3*", _one_full_of(6, SLIDING)),
    ("cohere2*", _one_full_of_four_if_windowed),
    ("olmo3*", _one_full_of_four_if_windowed),
    ("exaone4*", _one_full_of_four_if_windowed),
    ("qwen3_next*", _one_full_of(4, STATE)),
    ("qwen3_5*", _one_full_of(4, STATE)),
    ("llama4*", _one_full_of(4, CHUNKED)),
    ("smollm3", _smollm3),
    ("qwen2*", _windowed_from_a_layer_on),
    ("qwen3*", _windowed_from_a_layer_on),
    ("ernie4_5*", _windowed_from_a_layer_on),
    ("*", _all_alike),
)
