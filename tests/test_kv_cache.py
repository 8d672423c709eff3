"""The cache size of a model, compared with transformers' own cache after a forward pass."""

import json
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import LISTED, OTHERS, Tiny, is_known
from support.further_checkpoints import FURTHER

from int8cli.estimate.kv_cache import read_kv_cache
from int8cli.loaders.transformers_versions import release

TOKENS, ENCODER_TOKENS, BATCH = 13, 11, 2
_GQA = LISTED["qwen3"].arguments
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
_SLIDING = {**_GQA, "sliding_window": 6}
_INDEXED = {**LISTED["deepseek_v3"].arguments, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4}

VARIANTS = {
    "falcon-multi-head": Tiny(
        "FalconForCausalLM", "FalconConfig", {**LISTED["falcon"].arguments, "multi_query": False}
    ),
    "falcon-new": Tiny(
        "FalconForCausalLM",
        "FalconConfig",
        {**LISTED["falcon"].arguments, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "mistral-sliding": Tiny("MistralForCausalLM", "MistralConfig", _SLIDING),
    "gemma2-sliding": Tiny("Gemma2ForCausalLM", "Gemma2Config", _SLIDING),
    "gemma3-sliding": Tiny("Gemma3ForCausalLM", "Gemma3TextConfig", {**_SLIDING, "num_hidden_layers": 7}),
    "cohere2-sliding": Tiny("Cohere2ForCausalLM", "Cohere2Config", {**_SLIDING, "num_hidden_layers": 5}),
    "qwen2-sliding": Tiny(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**_SLIDING, "num_hidden_layers": 4, "use_sliding_window": True, "max_window_layers": 2},
    ),
    "qwen2-window-unused": Tiny("Qwen2ForCausalLM", "Qwen2Config", {**_SLIDING, "use_sliding_window": False}),
    "gpt_oss-sliding": Tiny(
        "GptOssForCausalLM", "GptOssConfig", {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "llama4-chunked": Tiny(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **_GQA,
            "num_hidden_layers": 4,
            "attention_chunk_size": 6,
            "num_local_experts": 2,
            "intermediate_size_mlp": 32,
        },
    ),
    "gpt_bigcode-multi-head": Tiny(
        "GPTBigCodeForCausalLM", "GPTBigCodeConfig", {**OTHERS["gpt_bigcode"].arguments, "multi_query": False}
    ),
    "granitemoehybrid": Tiny(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **LISTED["llama"].arguments,
            **_MAMBA2,
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention", "mamba", "attention"],
            "num_local_experts": 2,
            "shared_intermediate_size": 32,
        },
    ),
    "nemotron_h": Tiny(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **{name: value for name, value in _GQA.items() if name != "num_hidden_layers"},
            "hybrid_override_pattern": "M*M-",
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 1,
        },
    ),
    "exaone4": Tiny("Exaone4ForCausalLM", "Exaone4Config", {**_SLIDING, "num_hidden_layers": 5}),
    "olmo3": Tiny("Olmo3ForCausalLM", "Olmo3Config", {**_SLIDING, "num_hidden_layers": 5}),
    "smollm3-sliding": Tiny(
        "SmolLM3ForCausalLM", "SmolLM3Config", {**_SLIDING, "num_hidden_layers": 5, "use_sliding_window": True}
    ),
    "gemma3n-shared": Tiny(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **_SLIDING,
            "num_hidden_layers": 10,
            "num_kv_shared_layers": 5,
            "vocab_size_per_layer_input": 99,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
        },
    ),
    "deepseek_v32": Tiny("DeepseekV32ForCausalLM", "DeepseekV32Config", _INDEXED),
    "glm_moe_dsa": Tiny("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", _INDEXED),
    "gemma4": Tiny(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **_SLIDING,
            "num_hidden_layers": 6,
            "vocab_size_per_layer_input": 99,
            "hidden_size_per_layer_input": 8,
            "per_layer_config": {5: {"head_dim": 16}},
        },
    ),
    "minicpm3": Tiny("MiniCPM3ForCausalLM", "MiniCPM3Config", LISTED["deepseek_v3"].arguments),
    "glm4_moe_lite": Tiny("Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", LISTED["deepseek_v3"].arguments),
}
WITH_CACHE = {
    **{name: tiny for name, tiny in LISTED.items() if name not in ("bert", "roberta", "deberta-v2", "vit")},
    **{
        name: OTHERS[name]
        for name in (
            *("gemma", "xglm", "biogpt", "codegen", "gpt_bigcode", "ctrl", "rwkv", "mamba2", "falcon_mamba", "jamba"),
            *("olmo2", "starcoder2"),
        )
    },
    **{name: FURTHER[name] for name in ("bamba", "deepseek_v2", "falcon_h1", "lfm2", "qwen3_next", "zamba", "zamba2")},
    **VARIANTS,
}


def config_of(tiny: Tiny) -> tuple[Any, dict[str, Any]]:
    """The config as an object, and in the form of config.json. Skips the test if transformers lacks the model."""
    if not is_known(tiny):
        pytest.skip(f"transformers {transformers.__version__} has no {tiny.model}")
    config = getattr(transformers, tiny.config)(**tiny.arguments)
    return config, json.loads(config.to_json_string())


def cached_bytes(found: object) -> int:
    """The bytes of every tensor of a cache: keys, values and states."""
    if isinstance(found, torch.Tensor):
        return found.nbytes
    if isinstance(found, dict):
        return sum(map(cached_bytes, found.values()))
    if isinstance(found, (list, tuple)):
        return sum(map(cached_bytes, found))
    if hasattr(found, "self_attention_cache") and hasattr(found, "cross_attention_cache"):
        return cached_bytes(found.self_attention_cache) + cached_bytes(found.cross_attention_cache)
    if hasattr(found, "layers"):
        kept = ("keys", "values", "indexer_keys", "conv_states", "recurrent_states")
        return sum(cached_bytes(getattr(layer, name, None)) for layer in found.layers for name in kept)
    return 0


def measured_bytes(tiny: Tiny) -> int:
    """The size of the model's own cache after TOKENS tokens in float16."""
    torch.manual_seed(0)
    config, _ = config_of(tiny)
    model = getattr(transformers, tiny.model)(config).to(torch.float16).eval()
    ids = {"input_ids": torch.ones(BATCH, TOKENS, dtype=torch.long)}
    if config.is_encoder_decoder:
        ids = {
            "input_ids": torch.ones(BATCH, ENCODER_TOKENS, dtype=torch.long),
            "decoder_input_ids": torch.ones(BATCH, TOKENS, dtype=torch.long),
        }
    if config.model_type == "whisper":
        ids["input_features"] = torch.zeros(BATCH, 8, 2 * config.max_source_positions, dtype=torch.float16)
        del ids["input_ids"]
    with torch.no_grad():
        output = model(**ids, use_cache=True)
    cache = next(
        found for name in ("past_key_values", "cache_params", "state") if (found := output.get(name)) is not None
    )
    return cached_bytes(cache)


def estimated_bytes(config: dict[str, Any]) -> int:
    cache = read_kv_cache(config)
    assert cache.layers is not None, cache.reason
    encoder_tokens = cache.encoder_tokens or ENCODER_TOKENS
    return BATCH * sum(layer.bytes(TOKENS, encoder_tokens, 2) for layer in cache.layers)


# What the caches of transformers before 5.23 (seen in 5.0.0) do not have or do otherwise.
BEFORE_5_23 = {
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "gemma4"), "is not the class of today"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), "caches the keys and values of all heads"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "jamba", "qwen3_next", "lfm2"), "has a cache of another kind"),
    **dict.fromkeys(("zamba", "falcon_h1", "granitemoehybrid", "bamba"), "makes no cache unless it is given one"),
    "zamba2": "cannot be built with blocks that share weights",
}


@pytest.mark.parametrize("name", WITH_CACHE)
def test_the_estimate_equals_the_cache_of_transformers(name: str) -> None:
    config = config_of(WITH_CACHE[name])[1]
    if name in BEFORE_5_23 and release(transformers.__version__) < release("5.23.0"):
        pytest.skip(f"{name} {BEFORE_5_23[name]} in transformers {transformers.__version__}")
    assert estimated_bytes(config) == measured_bytes(WITH_CACHE[name]) > 0


@pytest.mark.parametrize(
    "name",
    [
        *(
            name
            for name, tiny in VARIANTS.items()
            if is_known(tiny) and "layer_types" in config_of(tiny)[1] and name not in ("granitemoehybrid", "gemma4")
        ),
        *("gemma2", "qwen2", "zamba"),
    ],
)
def test_configs_older_than_layer_types_mean_the_same(name: str) -> None:
    config = config_of(WITH_CACHE[name])[1]
    expected = read_kv_cache(config)
    older = {key: value for key, value in config.items() if key not in ("layer_types", "layers_block_type")}
    if name == "lfm2":
        older["full_attn_idxs"] = [1]
    assert read_kv_cache(older) == expected


def test_bloom_caches_four_megabytes_per_token() -> None:
    config = {"model_type": "bloom", "n_layer": 70, "n_head": 112, "hidden_size": 14336, "seq_length": 2048}
    cache = read_kv_cache(config)
    assert cache.bytes_a_token(2) == 4_014_080
    assert cache.default_context == 2048
    assert sum(cache.layer_bytes(2048, 1, 2) or ()) == 2048 * 4_014_080


def test_the_default_context_is_the_models_own_up_to_8192() -> None:
    llama = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    assert read_kv_cache({**llama, "max_position_embeddings": 4096}).default_context == 4096
    assert read_kv_cache({**llama, "max_position_embeddings": 131072}).default_context == 8192
    assert read_kv_cache(llama).default_context == 2048


def test_a_nested_text_config_is_used() -> None:
    text = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 9, "num_attention_heads": 2, "hidden_size": 64}
    config = {"model_type": "llava", "text_config": text, "vision_config": vision}
    assert read_kv_cache(config) == read_kv_cache(text)


def test_an_element_of_the_cache_may_be_wider_or_narrower_but_not_the_recurrent_state() -> None:
    config = config_of(OTHERS["jamba"])[1]
    cache = read_kv_cache(config)
    assert cache.layers is not None
    wide, narrow = (sum(cache.layer_bytes(10, 1, size) or ()) for size in (4, 2))
    recurrent = sum(layer.float32_elements for layer in cache.layers) * 4
    assert recurrent > 0
    assert wide - recurrent == 2 * (narrow - recurrent)


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "vit"])
def test_an_encoder_has_no_cache_and_the_report_says_so(name: str) -> None:
    cache = read_kv_cache(config_of(LISTED[name])[1])
    assert cache.layers == ()
    assert "no cache" in cache.reason


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({}, "config.json"),
        ({"model_type": "xlnet", "n_layer": 2, "n_head": 4, "d_model": 32}, "xlnet"),
        ({"model_type": "llama"}, "num_hidden_layers"),
        ({"model_type": "llama", "num_hidden_layers": 2}, "num_attention_heads"),
        ({"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4}, "hidden_size"),
        ({"model_type": "new", "layer_types": ["lightning"], "num_hidden_layers": 1}, "lightning"),
        (
            {"model_type": "new", "ssm_state": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8},
            "ssm_state",
        ),
        (
            {"model_type": "new", "kv_lora_rank": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
            "kv_lora_rank",
        ),
        (
            {"model_type": "new", "num_hidden_layers": 0, "num_attention_heads": 4, "hidden_size": 8},
            "num_hidden_layers",
        ),
        (
            {"model_type": "llama", "num_hidden_layers": 10**12, "num_attention_heads": 1, "hidden_size": 8},
            "implausibly many",
        ),
        (
            {"model_type": "bamba", "attn_layer_indices": 3, "num_hidden_layers": 2, "num_attention_heads": 1},
            "does not fit its model type",
        ),
        ({"model_type": "llama", "num_hidden_layers": "two", "num_attention_heads": True}, "num_hidden_layers"),
    ],
)
def test_an_unknown_cache_has_a_reason_and_no_size(config: dict[str, Any], word: str) -> None:
    cache = read_kv_cache(config)
    assert cache.layers is None
    assert cache.layer_bytes(10, 1, 2) is None
    assert cache.bytes_a_token(2) is None
    assert word in cache.reason
