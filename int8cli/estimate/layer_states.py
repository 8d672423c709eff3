"""The state of a layer that is not attention: convolutions and recurrences, in elements, by model family.

Owns the size of these states in transformers. A state does not grow with the text.
"""

from collections.abc import Callable

from int8cli.estimate.config_fields import Fields, MissingFieldError, UnknownCacheError

_CONVOLUTION = ("mamba_d_conv", "conv_kernel")


def state_elements(fields: Fields) -> tuple[int, int]:
    """Elements of a layer's state: in the cache's dtype (the convolution's), and in float32 (the recurrence's)."""
    sizes = STATES.get(fields.model_type)
    if sizes is None:
        raise UnknownCacheError(f"the state of {fields.model_type or 'this model'}'s layers is unknown to int8cli")
    return sizes(fields)


def _mamba(fields: Fields) -> tuple[int, int]:
    # In models that also have attention, intermediate_size is that of the MLP.
    stated = fields.has("state_size") and fields.has("intermediate_size")
    inner = fields.number("intermediate_size") if stated else _expanded(fields)
    return inner * fields.number(*_CONVOLUTION), inner * _state_width(fields)


def _mamba2(fields: Fields) -> tuple[int, int]:
    heads = fields.number("n_mamba_heads", "mamba_n_heads", "mamba_num_heads", "num_heads")
    if fields.model_type == "falcon_h1" and "mamba_d_ssm" not in fields.config:
        raise MissingFieldError("config.json has no mamba_d_ssm")
    inner = fields.number("mamba_d_ssm") if fields.has("mamba_d_ssm") else _expanded(fields)
    head_widths = ("mamba_headdim", "mamba_d_head", "mamba_head_dim", "head_dim")
    names = head_widths if fields.model_type == "mamba2" else head_widths[:-1]
    automatic = any(fields.config.get(name) == "auto" for name in names)
    width = fields.number(*names, default=inner // heads if automatic else None)
    if fields.model_type == "nemotron_h":
        inner = heads * width
    state_width = _state_width(fields)
    convolved = inner + 2 * fields.number("mamba_ngroups", "mamba_n_groups", "n_groups") * state_width
    return convolved * fields.number(*_CONVOLUTION), heads * width * state_width


def _expanded(fields: Fields) -> int:
    return fields.number("mamba_expand", "expand") * fields.number("hidden_size")


def _state_width(fields: Fields) -> int:
    return fields.number("mamba_d_state", "ssm_state_size", "state_size")


def _gated_delta(fields: Fields) -> tuple[int, int]:
    key_width, value_heads = fields.number("linear_key_head_dim"), fields.number("linear_num_value_heads")
    keys = fields.number("linear_num_key_heads") * key_width
    values = value_heads * fields.number("linear_value_head_dim")
    return (2 * keys + values) * fields.number("linear_conv_kernel_dim"), values * key_width


def _short_convolution(fields: Fields) -> tuple[int, int]:
    return fields.number("hidden_size") * fields.number("conv_L_cache"), 0


def _rwkv(fields: Fields) -> tuple[int, int]:
    width = fields.number("hidden_size")
    return 2 * width, 3 * fields.number("attention_hidden_size", default=width)


STATES: dict[str, Callable[[Fields], tuple[int, int]]] = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba", "zamba"), _mamba),
    **dict.fromkeys(("mamba2", "zamba2", "falcon_h1", "granitemoehybrid", "bamba", "nemotron_h"), _mamba2),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _gated_delta),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _short_convolution),
    "rwkv": _rwkv,
}
