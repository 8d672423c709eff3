"""The size of a model's KV cache in bytes, from its config alone.

Owns the size of a layer's cache in every family: attention and its variants, the state of state-space and linear
layers, the cross-attention of a decoder. The sizes are those of transformers' own cache after a forward pass, and tests
compare the two. If the config does not determine a size, the result is a reason instead of a guess.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from int8cli.estimate.attention_heads import LATENT, token_elements
from int8cli.estimate.config_fields import (
    DECODER_LENGTH,
    LENGTH,
    Fields,
    LanguageModel,
    MissingFieldError,
    UnknownCacheError,
    language_model,
)
from int8cli.estimate.key_value_rows import RowsByLayer
from int8cli.estimate.layer_kinds import CHUNKED, FULL, HYBRID, NOTHING, SLIDING, STATE, layer_kinds, refuse_foreign
from int8cli.estimate.layer_states import STATES, state_elements

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
    "wavlm unispeech data2vec-audio data2vec-vision align altclip chinese_clip clap clip_text_model clipseg flava "
    "groupvit metaclip_2 owlv2 owlvit siglip_text_model siglip2_text_model x_clip"
)
# Their code has no cache: every token is computed again from all tokens before it.
_CACHELESS = _types("openai-gpt")
_CROSS_ATTENDING = _types(
    "bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus "
    "pegasus_x pix2struct plbart prophetnet speech_to_text switch_transformers t5 t5gemma t5gemma2 udop umt5 whisper "
    "encoder-decoder musicgen musicgen_melody"
)
# These have another kind of memory, or an encoder whose length is not that of a text.
_UNKNOWN = _types(
    "xlnet transfo-xl reformer blip blip-2 cpmant git vision-encoder-decoder speech-encoder-decoder xlstm"
)


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
    why. `encoder_tokens` is the length of the encoder's output if that is fixed. `assumed` are the fields that
    config.json leaves to its class and on which the size depends. `answerable`: the class may know what is missing.
    """

    layers: tuple[LayerCache, ...] | None
    reason: str
    own_context: int | None = None
    encoder_tokens: int | None = None
    assumed: tuple[str, ...] = field(default=(), compare=False)
    answerable: bool = field(default=False, compare=False)

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
        return replace(_read(model, config, rows), assumed=tuple(model.fields.assumed))
    except MissingFieldError as error:
        answerable = not isinstance(error, UnknownCacheError)
        return KvCache(None, str(error), _own_context(model.fields), answerable=answerable)
    except (TypeError, ValueError):  # a field of a type that no such config has
        return KvCache(None, "config.json does not fit its model type", _own_context(model.fields))


def _read(model: LanguageModel, config: Mapping[str, Any], rows: RowsByLayer) -> KvCache:
    fields = model.fields
    context = _own_context(fields)
    if not _ENCODERS.isdisjoint(model.model_types) and not fields.has("is_decoder"):
        return KvCache((), "an encoder reads its input at once and needs no cache", context)
    if _is_encoder_alone(config):
        return KvCache((), "an encoder reads its input at once and needs no cache", context)
    if fields.model_type in _CACHELESS:
        return KvCache((), f"{fields.model_type} has no cache in transformers", context)
    if "_class_name" in config:
        return KvCache((), "a part of a diffusion pipeline needs no cache", context)
    if not config.get("model_type") and not (any(rows) and "vocab_size" in config):
        raise UnknownCacheError("config.json names no model_type")
    if "image_size" in fields.config and "vocab_size" not in fields.config:
        return KvCache((), "an image model needs no cache", context)
    for model_type in model.model_types:
        if model_type in _UNKNOWN:
            raise UnknownCacheError(f"the cache of {model_type} is unknown to int8cli")
    cross = model.cross_attends
    if cross is None:
        cross = not _CROSS_ATTENDING.isdisjoint(model.model_types)
    refuse_foreign(fields, frozenset(STATES) | LATENT)
    kinds = layer_kinds(model, len(rows), decoder=cross)
    # Blocks beyond the config's count are prediction layers; where there are fewer, they stand for each other.
    known = rows if len(rows) >= len(kinds) else ()
    layers = tuple(
        _layer(kind, model, layer, known[layer] if known else None, cross=cross) for layer, kind in enumerate(kinds)
    )
    encoder_tokens = fields.number("max_source_positions", default=0) if fields.model_type == "whisper" else 0
    return KvCache(layers, _summary(layers, fields), context, encoder_tokens or None)


def _is_encoder_alone(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint is the encoder of an encoder-decoder, as its class says (`T5EncoderModel`)."""
    classes = config.get("architectures")
    return bool(classes) and all(re.search(r"Encoder(?:Model)?$", str(name)) for name in classes or ())


def _own_context(fields: Fields) -> int | None:
    return fields.number(*DECODER_LENGTH, *LENGTH, default=0) or None


def _layer(kind: str, model: LanguageModel, layer: int, rows: int | None, *, cross: bool) -> LayerCache:
    attends = kind in (FULL, SLIDING, CHUNKED, HYBRID)
    a_token = token_elements(model, layer, rows, cross=cross) if attends else 0
    state = state_elements(model.fields) if kind in (STATE, HYBRID) else (0, 0)
    return LayerCache(kind, a_token, _window(kind, model.fields), a_token if cross and attends else 0, *state)


def _window(kind: str, fields: Fields) -> int | None:
    """How many tokens a layer caches: in transformers one fewer than the window, which includes the next token."""
    if kind == SLIDING:
        return fields.number("sliding_window") - 1
    if kind == CHUNKED:
        return fields.number("attention_chunk_size") - 1
    return None


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
