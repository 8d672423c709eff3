"""What each layer of a language model keeps of the tokens it has seen, as its config tells it, family by family.

Owns the patterns in which families alternate their layers: full attention, sliding windows, states. Knows names of
config fields (`dimensions`) and no bytes. The patterns are those of transformers' configuration classes, for configs
that were written before `layer_types` was.
"""

import re
from collections.abc import Callable

from int8cli.estimate.config_fields import DECODER_LAYERS, LAYERS, Fields, MissingFieldError

FULL = "full attention"
SLIDING = "sliding window"
CHUNKED = "attention in chunks"
STATE = "state"
HYBRID = "attention and state"
NOTHING = "nothing"

# transformers' own words, and those from before (configuration_utils.py, `_LEGACY_LAYER_TYPE_REMAP`).
_WORDS = {
    "full_attention": FULL,
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
# Signs of a cache that is not told here: of a model type that is not listed, and of any.
_FOREIGN = re.compile(
    r"mamba|ssm|(^|_)conv|rwkv|recurren|linear_(?!bias)|state_size|lora_rank|retention|hyena|_mem(_|$)"
)
_UNTOLD = (
    *("global_head_dim", "num_global_key_value_heads", "attn_type_list", "block_configs", "compress_ratios"),
    *("index_topk", "index_head_dim", "attention_window_size", "kv_sharing_modes"),
)

STATE_FAMILIES = frozenset({"mamba", "falcon_mamba", "mamba2", "rwkv"})
_ALTERNATING = frozenset({"gemma2", "gpt_oss", "vaultgemma"})
_OPTIONAL_WINDOW = re.compile(r"qwen2|qwen3|ernie4_5")
_EVERY_FOURTH_FULL = re.compile(r"cohere2|olmo3|exaone4|qwen3_next|qwen3_5|llama4")
_PATTERN_FIELDS = (
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "full_attention_interval",
    "no_rope_layer_interval",
)
_MOST_LAYERS = 10_000

Kinds = tuple[str, ...]


def layer_kinds(fields: Fields, *, decoder: bool) -> Kinds:
    """What each layer keeps, first to last. Raises MissingFieldError where the config is not understood."""
    for name in _UNTOLD:
        if fields.has(name):
            raise MissingFieldError(f"a cache with {name} is not known here")
    kinds = _told(fields)
    if kinds is None:
        count = fields.number(*(DECODER_LAYERS if decoder else LAYERS))
        if count > _MOST_LAYERS:
            raise MissingFieldError(f"{count:,} layers are more than any model has")
        kinds = tuple(_kind_by_family(fields)(layer) for layer in range(count))
    return _without_shared(kinds, fields)


def refuse_foreign(fields: Fields, told: frozenset[str]) -> None:
    """Raise MissingFieldError for a model type that is not `told` and whose config shows more than attention."""
    if fields.model_type in told:
        return
    for name, value in fields.config.items():
        if value and not isinstance(value, str) and _FOREIGN.search(name):
            raise MissingFieldError(
                f"{name} tells of a cache that is not known for {fields.model_type or 'this model'}"
            )


def _told(fields: Fields) -> Kinds | None:
    """The kinds that the config lists, layer by layer."""
    words = fields.words("layer_types") or fields.words("layers_block_type")
    pattern = fields.config.get("hybrid_override_pattern")
    if words is None and isinstance(pattern, str) and pattern:
        words = tuple(pattern)
    if words is None:
        return None
    for word in words:
        if word not in _WORDS:
            raise MissingFieldError(f"layers of the type {word!r} are not known here")
    return tuple(_WORDS[word] for word in words)


def _kind_by_family(fields: Fields) -> Callable[[int], str]:
    """A function from a layer's index to its kind, where the config does not list them."""
    family, config = fields.model_type, fields.config
    window = fields.has("sliding_window")
    if family in STATE_FAMILIES:
        return lambda layer: STATE
    if family == "falcon_h1":
        return lambda layer: HYBRID
    if family == "jamba":
        period, offset = fields.number("attn_layer_period", default=8), int(config.get("attn_layer_offset", 4))
        return lambda layer: FULL if layer % period == offset else STATE
    if family == "zamba":
        period, offset = fields.number("attn_layer_period", default=6), int(config.get("attn_layer_offset", 4))
        return lambda layer: HYBRID if layer == 2 or (layer > 2 and (layer - 3) % period == offset) else STATE
    if family == "bamba":
        attending = tuple(config.get("attn_layer_indices") or ())
        return lambda layer: FULL if layer in attending else STATE
    if family in ("lfm2", "lfm2_moe"):
        listed = config.get("full_attn_idxs")
        return lambda layer: FULL if listed is None or layer in listed else STATE
    if family in ("granitemoehybrid", "zamba2", "nemotron_h"):
        raise MissingFieldError("config.json does not list its layer_types")
    if family in _ALTERNATING:
        return lambda layer: FULL if layer % 2 else SLIDING
    if family.startswith("gemma3"):
        every = 5 if family.startswith("gemma3n") else fields.number(*_PATTERN_FIELDS, default=6)
        return lambda layer: SLIDING if (layer + 1) % every else FULL
    if _EVERY_FOURTH_FULL.match(family):
        return _every_nth_full(fields, window=window)
    if family == "smollm3":
        every, used = fields.number(*_PATTERN_FIELDS, default=4), fields.flag("use_sliding_window", default=False)
        return lambda layer: SLIDING if window and used and (layer + 1) % every == 0 else FULL
    if _OPTIONAL_WINDOW.match(family):
        first = int(config.get("max_window_layers") or 0)
        used = window and fields.flag("use_sliding_window", default=False)
        return lambda layer: SLIDING if used and layer >= first else FULL
    if window:
        return lambda layer: SLIDING
    return lambda layer: CHUNKED if fields.has("attention_chunk_size") else FULL


def _every_nth_full(fields: Fields, *, window: bool) -> Callable[[int], str]:
    """All layers but each fourth, or so, keep less than everything."""
    every = fields.number(*_PATTERN_FIELDS, default=4)
    others = STATE if fields.model_type.startswith("qwen3") else SLIDING
    if fields.model_type.startswith("llama4"):
        others = CHUNKED
    if others == SLIDING and not window:
        return lambda layer: FULL
    return lambda layer: others if (layer + 1) % every else FULL


def _without_shared(kinds: Kinds, fields: Fields) -> Kinds:
    """Layers that read an earlier layer's cache keep none of their own: the last ones (gemma3n)."""
    shared = fields.number("num_kv_shared_layers", default=0)
    return kinds[: len(kinds) - shared] + (NOTHING,) * min(shared, len(kinds))
