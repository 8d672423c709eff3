"""Reads config.json, in which each model family has its own names for layers, heads, widths and lengths.

Owns these names, and which part of a nested config describes the language model. Does not compute memory or read files.
A missing number raises MissingFieldError; it never counts as zero. What is assumed in the place of a field that the
config leaves to its class is written down.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The alternative names of each field, in order of preference.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DECODER_LAYERS = ("decoder_layers", "num_decoder_layers", *LAYERS)
WIDTH = ("hidden_size", "n_embd", "n_embed", "d_model", "dim", "model_dim")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
DECODER_HEADS = ("decoder_attention_heads", "num_decoder_attention_heads", *HEADS)
# Each is a number, or a list with one for each layer.
KEY_VALUE_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "n_kv_head", "multi_query_group_num"),
    *("num_key_value_heads_per_layer", "num_kv_heads_per_layer", "num_attention_groups", "num_query_groups"),
)
HEAD_WIDTH = ("head_dim", "attention_head_dim", "kv_channels", "d_kv")
LENGTH = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "n_ctx", "max_sequence_length")
DECODER_LENGTH = ("max_target_positions", *LENGTH)
# The names of the language model's config inside that of a larger model.
NESTED = ("text_config", "llm_config", "language_config", "decoder", "thinker_config", "text_model_config")


class MissingFieldError(LookupError):
    """A config lacks a field, which the message names. Always caught inside `estimate`."""


class UnknownCacheError(MissingFieldError):
    """A config describes a cache that is unknown to int8cli, whatever its class would add."""


@dataclass(frozen=True)
class Fields:
    """A config, or the part of it that describes the language model. Fields can be read by alternative names.

    `assumed` collects the fields that only the config's class knows, and in whose place something was assumed.
    """

    config: Mapping[str, Any]
    assumed: dict[str, None] = field(default_factory=dict, compare=False)

    def assume(self, name: str) -> None:
        """The class may have something else for this field than what is taken."""
        self.assumed.setdefault(name)

    @property
    def model_type(self) -> str:
        found = self.config.get("model_type")
        return found if isinstance(found, str) else ""

    def has(self, name: str) -> bool:
        """Whether a field exists and is not None, false, zero or empty."""
        return bool(self.config.get(name))

    def number(self, *names: str, default: int | None = None) -> int:
        """The first of these fields that holds a positive whole number. Raises MissingFieldError without a default."""
        for name in names:
            found = self.config.get(name)
            if isinstance(found, float) and found.is_integer():
                found = int(found)
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found
        if default is None:
            raise MissingFieldError(f"config.json has no {' or '.join(names[:3])}")
        return default

    def number_of(self, layer: int, *names: str, default: int | None = None) -> int:
        """The same for one layer, where a field may list a number for each. Raises MissingFieldError."""
        for name in names:
            listed = self.config.get(name)
            if not isinstance(listed, (list, tuple)) or not listed:
                continue
            found = listed[layer] if layer < len(listed) else None
            if not isinstance(found, int) or isinstance(found, bool) or found < 0:
                raise MissingFieldError(f"{name} has no number for layer {layer}")
            return found
        return self.number(*names, default=default)

    def words(self, name: str) -> tuple[str, ...] | None:
        """A field that is a list of words; None if it is missing, empty or not a list."""
        found = self.config.get(name)
        return tuple(map(str, found)) if isinstance(found, (list, tuple)) and found else None

    def flag(self, name: str, *, default: bool) -> bool:
        found = self.config.get(name)
        return found if isinstance(found, bool) else default


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """The part of a config that describes the text model, and the model types from the whole to that part.

    `cross_attends`: it also attends to an encoder's output; None where the config does not say.
    """

    fields: Fields
    model_types: tuple[str, ...]
    cross_attends: bool | None


def language_model(config: Mapping[str, Any]) -> LanguageModel:
    """The text model of a config, which may be nested. Follows transformers' `get_text_config(decoder=True)`."""
    stated = config.get("is_encoder_decoder")
    model_types: tuple[str, ...] = ()
    while True:
        model_types += (str(config.get("model_type")),)
        nested = next((config[name] for name in NESTED if _is_model(config.get(name))), None)
        if nested is None:
            return LanguageModel(Fields(config), model_types, stated if isinstance(stated, bool) else None)
        config = nested


def _is_model(value: object) -> bool:
    """Whether this is the config of a model. One that leaves its size to its class says its type at least."""
    return isinstance(value, Mapping) and (
        isinstance(value.get("model_type"), str)
        or any(name in value for name in LAYERS)
        or any(_is_model(value.get(name)) for name in NESTED)
    )
