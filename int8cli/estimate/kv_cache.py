"""The size of a model's KV cache in bytes, from its config alone.

Owns the size of a layer's cache in every family: attention and its variants, the state of state-space and linear
layers, the cross-attention of a decoder. The sizes are those of transformers' own cache after a forward pass, and tests
compare the two. If the config does not determine a size, the result is a reason instead of a guess.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from int8cli.estimate.config_fields import (
    DECODER_HEADS,
    DECODER_LENGTH,
    HEAD_WIDTH,
    HEADS,
    KEY_VALUE_HEADS,
    LENGTH,
    WIDTH,
    Fields,
    LanguageModel,
    MissingFieldError,
    language_model,
)
from int8cli.estimate.key_value_rows import RowsByLayer
from int8cli.estimate.layer_kinds import CHUNKED, FULL, HYBRID, NOTHING, SLIDING, STATE, layer_kinds, refuse_foreign
from int8cli.loaders.class_defaults import head_width

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}
CONTEXT_CAP = 8192
CONTEXT_WITHOUT_ONE = 2048
_FLOAT32_BYTES = 4


def _types(names: str) -> frozenset[str]:
    return frozenset(names.split())


# These read their whole input at once and do not generate token by token.
_ENCODERS = _types(
    "albert bert big_bird camembert canine convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm "
    "eurobert flaubert fnet funnel ibert jina_embeddings_v3 layoutlm layoutlmv2 layoutlmv3 longformer luke "
    "megatron-bert mobilebert modernbert mpnet mra nezha nomic_bert nystromformer rembert roberta roberta-prelayernorm "
    "roc_bert roformer splinter squeezebert tapas xlm-roberta xlm-roberta-xl xmod yoso beit clip clip_vision_model "
    "convnext deit dinov2 dinov3_vit hiera hubert ijepa segformer siglip siglip2 swin swinv2 vit vit_mae wav2vec2 "
    "wavlm unispeech data2vec-audio data2vec-vision"
)
# Their code has no cache: every token is computed again from all tokens before it.
_CACHELESS = _types("openai-gpt")
_CROSS_ATTENDING = _types(
    "bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus "
    "pegasus_x plbart prophetnet speech_to_text switch_transformers t5 t5gemma umt5 whisper"
)
# Latent attention whose latents transformers caches as they are: keys are the latent, values the rotary part. Seen in
# 5.23.0 and 5.24.0; 5.0.0 caches the keys and values of all heads, as it does for the other families.
_LATENT = _types("deepseek_v2 deepseek_v3 kimi_k2 glm4_moe_lite minicpm3")
# These have another kind of memory, or an encoder whose length is not that of a text.
_UNKNOWN = _types("xlnet transfo-xl reformer blip blip-2 git vision-encoder-decoder speech-encoder-decoder")
# Configs on the Hub leave this field out, and the class does not default to one head per query head.
_CLASS_KEY_VALUE_HEADS = {"mistral": 8, "mixtral": 8}
# Other words for a number of heads that share keys and values.
_KEY_VALUE_NAME = re.compile(r"(?:^|_)(?:kv|key_value)s?_(?:heads?|groups?)|(?:query|attention|head)_groups?(?:_|$)")


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The cache of one layer for one sequence, in elements.

    `token_elements` are per token, for at most `window` tokens. `cross_elements` are per token of the encoder.
    `state_elements` do not depend on the length, nor do `float32_elements`, which are always in float32.
    """

    kind: str
    token_elements: int = 0
    window: int | None = None
    cross_elements: int = 0
    state_elements: int = 0
    float32_elements: int = 0

    def bytes(self, tokens: int, encoder_tokens: int, element_bytes: int) -> int:
        cached = tokens if self.window is None else min(tokens, self.window)
        elements = self.token_elements * cached + self.cross_elements * encoder_tokens + self.state_elements
        return elements * element_bytes + self.float32_elements * _FLOAT32_BYTES


@dataclass(frozen=True, slots=True)
class KvCache:
    """The cache of a model by layer, in the order of its (decoder's) blocks.

    `layers` is None if the config is not understood, and empty if the model has no cache. In both cases `reason` says
    why. `encoder_tokens` is the length of the encoder's output if that is fixed.
    """

    layers: tuple[LayerCache, ...] | None
    reason: str
    own_context: int | None = None
    encoder_tokens: int | None = None

    @property
    def default_context(self) -> int:
        """The model's maximum length, but at most 8192 tokens."""
        return min(self.own_context or CONTEXT_WITHOUT_ONE, CONTEXT_CAP)

    def layer_bytes(self, tokens: int, batch: int, element_bytes: int) -> tuple[int, ...] | None:
        """The cache of each layer in bytes, for `batch` sequences of `tokens` tokens."""
        if self.layers is None:
            return None
        encoder = tokens if self.encoder_tokens is None else self.encoder_tokens
        return tuple(batch * layer.bytes(tokens, encoder, element_bytes) for layer in self.layers)

    def bytes_a_token(self, element_bytes: int) -> int | None:
        """The bytes that one more token adds, as long as no window is full."""
        return None if self.layers is None else element_bytes * sum(layer.token_elements for layer in self.layers)


def read_kv_cache(config: Mapping[str, Any], rows: RowsByLayer = ()) -> KvCache:
    """What config.json tells of the cache, and the headers: `rows` of keys and values by block, where they tell."""
    if not config:
        return KvCache(None, "there is no config.json")
    model = language_model(config)
    try:
        return _read(model, config, rows)
    except MissingFieldError as error:
        return KvCache(None, str(error), _own_context(model.fields))
    except (TypeError, ValueError):  # a field of a type that no such config has
        return KvCache(None, "config.json does not fit its model type", _own_context(model.fields))


def _read(model: LanguageModel, config: Mapping[str, Any], rows: RowsByLayer) -> KvCache:
    fields = model.fields
    context = _own_context(fields)
    if fields.model_type in _ENCODERS and not fields.has("is_decoder"):
        return KvCache((), "an encoder reads its input at once and needs no cache", context)
    if _is_encoder_alone(config):
        return KvCache((), "an encoder reads its input at once and needs no cache", context)
    if fields.model_type in _CACHELESS:
        return KvCache((), f"{fields.model_type} has no cache in transformers", context)
    if "image_size" in fields.config and "vocab_size" not in fields.config:
        return KvCache((), "an image model needs no cache", context)
    for model_type in (fields.model_type, str(config.get("model_type"))):
        if model_type in _UNKNOWN:
            raise MissingFieldError(f"the cache of {model_type} is unknown to int8cli")
    cross = model.cross_attends or fields.model_type in _CROSS_ATTENDING
    refuse_foreign(fields, frozenset(_STATES) | _LATENT)
    kinds = layer_kinds(fields, decoder=cross)
    # Blocks beyond the config's count are prediction layers; where there are fewer, they stand for each other.
    known = rows if len(rows) >= len(kinds) else ()
    layers = tuple(
        _layer(kind, fields, layer, known[layer] if known else None, cross=cross) for layer, kind in enumerate(kinds)
    )
    encoder_tokens = fields.number("max_source_positions", default=0) if fields.model_type == "whisper" else 0
    return KvCache(layers, _summary(layers, fields), context, encoder_tokens or None)


def _is_encoder_alone(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint is the encoder of an encoder-decoder, as its class says (`T5EncoderModel`)."""
    classes = config.get("architectures")
    return bool(classes) and all(re.search(r"Encoder(?:Model)?$", str(name)) for name in classes or ())


def _own_context(fields: Fields) -> int | None:
    return fields.number(*DECODER_LENGTH, *LENGTH, default=0) or None


def _layer(kind: str, fields: Fields, layer: int, rows: int | None, *, cross: bool) -> LayerCache:
    attends = kind in (FULL, SLIDING, CHUNKED, HYBRID)
    token_elements = _token_elements(fields, layer, rows, cross=cross) if attends else 0
    state = _state(fields) if kind in (STATE, HYBRID) else (0, 0)
    return LayerCache(
        kind,
        token_elements,
        _window(kind, fields),
        token_elements if cross and attends else 0,
        *state,
    )


def _window(kind: str, fields: Fields) -> int | None:
    """How many tokens a layer caches: in transformers one fewer than the window, which includes the next token."""
    if kind == SLIDING:
        return fields.number("sliding_window") - 1
    if kind == CHUNKED:
        return fields.number("attention_chunk_size") - 1
    return None


def _token_elements(fields: Fields, layer: int, rows: int | None, *, cross: bool) -> int:
    """Keys and values of one token in one layer: the rows of their projections, or what the config says."""
    if fields.has("kv_lora_rank"):
        return fields.number("kv_lora_rank") + fields.number("qk_rope_head_dim")
    if rows is not None:
        return rows
    heads = fields.number_of(layer, *(DECODER_HEADS if cross else HEADS))
    default_width = head_width(fields.model_type) or fields.number(*WIDTH, default=0) // max(heads, 1)
    width = fields.number_of(layer, *HEAD_WIDTH, default=default_width)
    if not width:
        raise MissingFieldError("config.json has neither head_dim nor hidden_size")
    key_value_heads = heads if cross else _key_value_heads(fields, heads, layer)
    return key_value_heads * (width + fields.number("v_head_dim", default=width))


def _key_value_heads(fields: Fields, heads: int, layer: int) -> int:
    family = fields.model_type
    if family == "gpt_bigcode":
        return 1 if fields.flag("multi_query", default=True) else heads
    if family in ("falcon", "RefinedWeb", "RefinedWebModel"):
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
    return fields.number_of(layer, *KEY_VALUE_HEADS, default=_CLASS_KEY_VALUE_HEADS.get(family, heads))


def _state(fields: Fields) -> tuple[int, int]:
    """Elements of a layer's state: in the cache's dtype (the convolution's), and in float32 (the recurrence's)."""
    sizes = _STATES.get(fields.model_type)
    if sizes is None:
        raise MissingFieldError(f"the state of {fields.model_type or 'this model'}'s layers is unknown to int8cli")
    return sizes(fields)


def _mamba(fields: Fields) -> tuple[int, int]:
    expanded = fields.number("mamba_expand", "expand", default=2) * fields.number("hidden_size")
    # In models that also have attention, intermediate_size is that of the MLP.
    inner = fields.number("intermediate_size", default=expanded) if fields.has("state_size") else expanded
    return inner * fields.number("mamba_d_conv", "conv_kernel", default=4), inner * _state_width(fields)


def _mamba2(fields: Fields) -> tuple[int, int]:
    expanded = fields.number("mamba_expand", "expand", default=2) * fields.number("hidden_size")
    heads = fields.number("n_mamba_heads", "mamba_n_heads", "mamba_num_heads", "num_heads")
    head_widths = ("mamba_headdim", "mamba_d_head", "mamba_head_dim", "head_dim")
    inner = fields.number("mamba_d_ssm", default=expanded)
    width = fields.number(*(head_widths if fields.model_type == "mamba2" else head_widths[:-1]), default=inner // heads)
    if fields.model_type == "nemotron_h":
        inner = heads * width
    groups = fields.number("mamba_ngroups", "mamba_n_groups", "n_groups", default=1)
    state_width = _state_width(fields)
    convolved = inner + 2 * groups * state_width
    return convolved * fields.number("mamba_d_conv", "conv_kernel", default=4), heads * width * state_width


def _state_width(fields: Fields) -> int:
    return fields.number("mamba_d_state", "ssm_state_size", "state_size")


def _gated_delta(fields: Fields) -> tuple[int, int]:
    key_width, value_heads = fields.number("linear_key_head_dim"), fields.number("linear_num_value_heads")
    keys = fields.number("linear_num_key_heads") * key_width
    values = value_heads * fields.number("linear_value_head_dim")
    return (2 * keys + values) * fields.number("linear_conv_kernel_dim"), values * key_width


def _short_convolution(fields: Fields) -> tuple[int, int]:
    return fields.number("hidden_size") * fields.number("conv_L_cache", default=3), 0


def _rwkv(fields: Fields) -> tuple[int, int]:
    width = fields.number("hidden_size")
    return 2 * width, 3 * fields.number("attention_hidden_size", default=width)


_STATES: dict[str, Callable[[Fields], tuple[int, int]]] = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba", "zamba"), _mamba),
    **dict.fromkeys(("mamba2", "zamba2", "falcon_h1", "granitemoehybrid", "bamba", "nemotron_h"), _mamba2),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _gated_delta),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _short_convolution),
    "rwkv": _rwkv,
}


def _summary(layers: tuple[LayerCache, ...], fields: Fields) -> str:
    """The kinds of layers in words: `26 sliding window (4,096), 26 full attention`."""
    groups: dict[str, int] = {}
    for layer in layers:
        if layer.kind != NOTHING:
            kind = _name(layer, fields)
            groups[kind] = groups.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in groups.items())


def _name(layer: LayerCache, fields: Fields) -> str:
    if layer.cross_elements:
        return f"{layer.kind} with cross-attention"
    if fields.has("kv_lora_rank") and layer.token_elements:
        return "latent attention, stored compressed"
    return layer.kind if layer.window is None else f"{layer.kind} ({layer.window + 1:,} tokens)"
