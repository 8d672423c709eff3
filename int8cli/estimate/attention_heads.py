"""The keys and values that attention caches for one token of one layer, in elements.

Owns the number and width of heads in every family, by the shapes of the projections or by the config. Where neither
tells, and the family's class may have something else than what is taken, that is written down in `Fields.assumed`.
"""

import re
from collections.abc import Mapping

from int8cli.estimate.config_fields import (
    DECODER_HEADS,
    HEAD_WIDTH,
    HEADS,
    KEY_VALUE_HEADS,
    WIDTH,
    Fields,
    LanguageModel,
    MissingFieldError,
    UnknownCacheError,
)
from int8cli.loaders import class_defaults
from int8cli.loaders.class_defaults import head_width, understands

# Latent attention whose latents transformers caches as they are: keys are the latent, values the rotary part. Seen in
# 5.23.0 and 5.24.0; 5.0.0 caches the keys and values of all heads, as it does for the other families.
LATENT = frozenset(
    (
        *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_k2"),
        *("minicpm3", "sarvam_mla", "youtu"),
    )
)
# An indexer beside it caches keys of its own.
_INDEXED = frozenset({"axk2", "deepseek_v32", "glm_moe_dsa"})
_INDEX_FIELDS = ("index_head_dim", "index_topk")
_BY_LAYER = "per_layer_config"
# Sizes of some of the layers. Their class says of which.
_SIZES_BY_LAYER = ("global_head_dim", "num_global_key_value_heads", "swa_num_key_value_heads", "swa_head_dim")
_REPEATED = frozenset({"falcon", "RefinedWeb", "RefinedWebModel"})
# Configs on the Hub leave this field out, and the class does not default to one head per query head.
_CLASS_KEY_VALUE_HEADS = {"mistral": 8, "mixtral": 8}
# Other words for a number of heads that share keys and values.
_KEY_VALUE_NAME = re.compile(r"(?:^|_)(?:kv|key_value)s?_(?:heads?|groups?)|(?:query|attention|head)_groups?(?:_|$)")


def token_elements(model: LanguageModel, layer: int, rows: int | None, *, cross: bool) -> int:
    """Keys and values of one token in one layer: the rows of their projections, or what the config says."""
    fields = _fields_of(model.fields, layer)
    if fields.has("kv_lora_rank"):
        return fields.number("kv_lora_rank") + fields.number("qk_rope_head_dim") + _index_elements(fields)
    for name in _INDEX_FIELDS:
        if fields.has(name):
            raise UnknownCacheError(f"a cache with {name} is unknown to int8cli")
    if rows is not None and fields.model_type not in _REPEATED:
        return rows
    for name in _SIZES_BY_LAYER:
        if fields.has(name) and not fields.has(_BY_LAYER):
            raise MissingFieldError(f"{name} does not say for which layers")
    heads = fields.number_of(layer, *(DECODER_HEADS if cross else HEADS))
    width = fields.number_of(layer, *HEAD_WIDTH, default=_assumed_width(model, fields, heads))
    if not width:
        raise MissingFieldError("config.json has neither head_dim nor hidden_size")
    key_value_heads = heads if cross else _key_value_heads(model, fields, heads, layer)
    return key_value_heads * (width + fields.number("v_head_dim", default=width))


def _fields_of(fields: Fields, layer: int) -> Fields:
    """The config of one layer, where transformers lists what differs between them."""
    listed = fields.config.get(_BY_LAYER)
    own = listed.get(str(layer)) if isinstance(listed, Mapping) else None
    return Fields({**fields.config, **own}, fields.assumed) if isinstance(own, Mapping) else fields


def _index_elements(fields: Fields) -> int:
    if fields.model_type not in _INDEXED:
        return 0
    words = fields.words("indexer_types")
    if words is not None and set(words) != {"full"}:
        raise UnknownCacheError("indexers that layers share are unknown to int8cli")
    return fields.number("index_head_dim")


def _assumed_width(model: LanguageModel, fields: Fields, heads: int) -> int:
    """The width of a head that the config does not name."""
    known = head_width(fields.model_type)
    if (
        known is None
        and not any(fields.has(name) for name in HEAD_WIDTH)
        and not understands(class_defaults.WIDTHS, model.model_types)
    ):
        fields.assume("head_dim")
    return known or fields.number(*WIDTH, default=0) // max(heads, 1)


def _key_value_heads(model: LanguageModel, fields: Fields, heads: int, layer: int) -> int:
    family = fields.model_type
    if family == "gpt_bigcode":
        return 1 if fields.flag("multi_query", default=True) else heads
    if family in _REPEATED:
        # With the new architecture, transformers repeats keys and values for every query head before it caches them.
        new = family == "RefinedWeb" or fields.flag("new_decoder_architecture", default=False)
        return 1 if not new and fields.flag("multi_query", default=True) else heads
    attention = fields.config.get("attn_config")
    if family == "mpt" and isinstance(attention, Mapping):
        if attention.get("attn_type") == "multiquery_attention":
            return 1
        return Fields(attention).number("kv_n_heads", default=heads)
    named = any(fields.has(name) for name in KEY_VALUE_HEADS)
    foreign = next((name for name in fields.config if fields.has(name) and _KEY_VALUE_NAME.search(name)), None)
    if foreign is not None and not named:
        raise MissingFieldError(f"a cache with {foreign} is unknown to int8cli")
    if not named and not understands(class_defaults.HEADS, model.model_types):
        fields.assume("num_key_value_heads")
    return fields.number_of(layer, *KEY_VALUE_HEADS, default=_CLASS_KEY_VALUE_HEADS.get(family, heads))
