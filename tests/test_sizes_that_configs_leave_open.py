"""Estimates of configs that leave sizes to their class, give them by layer, or name them anew."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import save_by_hand
from test_plan import plan_of, spec
from torch import Tensor

from int8cli import EstimateOptions, estimate_memory
from int8cli.estimate.asking import ConfigClass
from int8cli.estimate.estimate import Use
from int8cli.estimate.kv_cache import read_kv_cache
from int8cli.estimate.weights import names_not_in_memory

BASE = {"hidden_size": 64, "num_attention_heads": 16, "num_hidden_layers": 4, "model_type": "llama", "vocab_size": 96}
FLOAT16_BYTES = 2


def bytes_a_token(config: Mapping[str, Any], rows: tuple[int | None, ...] = ()) -> int | None:
    return read_kv_cache({**BASE, **config}, rows).bytes_a_token(FLOAT16_BYTES)


@pytest.mark.parametrize("name", ["num_key_value_heads", "num_key_value_heads_per_layer", "num_kv_heads"])
def test_heads_are_counted_by_layer(name: str) -> None:
    assert bytes_a_token({name: [4, 4, 2, 2]}) == FLOAT16_BYTES * 2 * 12 * 4
    assert bytes_a_token({name: [4, 4, 2]}) is None


@pytest.mark.parametrize("name", ["num_attention_groups", "num_query_groups", "multi_query_group_num"])
def test_heads_that_share_keys_go_by_other_names(name: str) -> None:
    assert bytes_a_token({name: 1}) == FLOAT16_BYTES * 2 * 4 * 4


@pytest.mark.parametrize("name", ["kv_head_count", "key_value_groups", "n_query_groups", "swa_num_key_value_heads"])
def test_what_may_be_a_number_of_heads_and_is_not_known_is_said(name: str) -> None:
    cache = read_kv_cache({**BASE, name: 2})
    assert cache.layers is None
    assert name in cache.reason


def test_the_shape_of_the_projections_comes_before_the_config() -> None:
    assert bytes_a_token({"num_key_value_heads": 4}, (96, 96, 96, 48)) == FLOAT16_BYTES * (3 * 96 + 48)
    # More blocks than layers: those that predict further tokens. Fewer: one for several, and the config speaks.
    assert bytes_a_token({"num_key_value_heads": 4}, (96, 96, 96, 96, 7)) == FLOAT16_BYTES * 4 * 96
    assert bytes_a_token({"num_key_value_heads": 4}, (96,)) == FLOAT16_BYTES * 4 * 2 * 16


def test_the_class_has_a_width_of_heads_that_its_config_leaves_out() -> None:
    assert bytes_a_token({"model_type": "qwen3", "num_key_value_heads": 1}) == FLOAT16_BYTES * 4 * 2 * 128


QWEN2 = {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 2}


@pytest.mark.parametrize("name", ["internvl_chat", "NVLM_D", "ovis"])
def test_a_wrapper_of_the_hub_around_a_language_model_changes_nothing(name: str) -> None:
    text = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 96, **QWEN2}
    alone, wrapped = (read_kv_cache(config, (96, 96)) for config in (text, {"model_type": name, "llm_config": text}))
    assert not wrapped.assumed
    assert (wrapped.layers, wrapped.reason) == (alone.layers, alone.reason)
    assert wrapped.bytes_a_token(FLOAT16_BYTES) == FLOAT16_BYTES * 2 * 96


def test_headers_settle_the_size_of_a_config_without_a_model_type() -> None:
    assert bytes_a_token({"model_type": None}, (96, 96, 96, 96)) == FLOAT16_BYTES * 4 * 96
    assert bytes_a_token({"model_type": None}) is None


def test_headers_tell_the_width_that_a_config_leaves_out(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {"language_model.model.embed_tokens.weight": torch.zeros(96, 64)}
    for layer in range(2):
        for name, rows in (("q_proj", 512), ("k_proj", 256), ("v_proj", 128)):
            tensors[f"language_model.model.layers.{layer}.self_attn.{name}.weight"] = torch.zeros(rows, 64)
            tensors[f"vision_tower.layers.{layer}.self_attn.{name}.weight"] = torch.zeros(7, 64)
    text = {"model_type": "new_text", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    source = save_by_hand(tmp_path / "source", tensors, {"model_type": "new", "text_config": text})
    estimate = estimate_memory(source, EstimateOptions()).estimate
    assert estimate.kv_bytes(Use(context=100)) == 2 * (256 + 128) * 100 * FLOAT16_BYTES


@pytest.mark.parametrize("listed", [5, True, "ab", {"3": 1}, ["3"], [[1]], [True], 1.5])
def test_layers_for_images_that_are_no_list_of_layers(listed: object) -> None:
    text = {"model_type": "mllama_text_model", "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64}
    for config in (
        text | {"cross_attention_layers": listed},
        {"text_config": text | {"cross_attention_layers": listed}},
    ):
        found = read_kv_cache({"model_type": "mllama", **config})
        assert (found.layers, found.reason) == (None, "cross_attention_layers is not a list of layers")


def test_a_fused_projection_with_narrow_values_is_sized_by_the_config(tmp_path: Path) -> None:
    """The output has the width of the values' heads, which tells nothing of how many rows are queries."""
    heads, key_value_heads, width, values = 8, 2, 24, 16
    rows = heads * width + key_value_heads * (width + values)
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": torch.zeros(96, 64)}
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.qkv_proj.weight"] = torch.zeros(rows, 64)
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] = torch.zeros(64, heads * values)
    config = {
        "model_type": "new",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": width,
        "v_head_dim": values,
    }
    estimate = estimate_memory(save_by_hand(tmp_path / "source", tensors, config), EstimateOptions()).estimate
    assert estimate.kv_bytes(Use(context=100)) == 2 * key_value_heads * (width + values) * 100 * FLOAT16_BYTES


def test_an_encoder_alone_keeps_nothing() -> None:
    config = {"model_type": "t5", "is_encoder_decoder": True, "d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    assert read_kv_cache(config | {"architectures": ["T5ForConditionalGeneration"]}).bytes_a_token(2) != 0
    assert read_kv_cache(config | {"architectures": ["T5EncoderModel"]}).layers == ()


TIED_WITHIN = {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": True}
HEAD = (spec("model.embed_tokens.weight", 96, 32), spec("lm_head.weight", 96, 32))


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"model_type": "gpt2"}, True),
        ({"model_type": "gpt2", "tie_word_embeddings": False}, False),
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "llava", "text_config": {"num_hidden_layers": 1, "tie_word_embeddings": True}}, True),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 1, "tie_word_embeddings": False}}, False),
        # Releases of transformers ask the outer config or the inner one: what only one ties is apart for the others.
        ({"model_type": "llava", "tie_word_embeddings": False, "text_config": TIED_WITHIN}, True),
        ({"model_type": "mllama", "text_config": TIED_WITHIN}, False),
        ({"model_type": "mllama", "tie_word_embeddings": True, "text_config": TIED_WITHIN}, True),
        ({"model_type": "internvl", "text_config": {"model_type": "llama", "num_hidden_layers": 1}}, False),
        ({"model_type": "internvl", "text_config": {"model_type": "qwen3", "num_hidden_layers": 1}}, True),
    ],
)
def test_a_stored_head_counts_once_where_it_is_tied(config: dict[str, Any], tied: bool) -> None:
    found = names_not_in_memory(plan_of(*HEAD, config=config).decisions, config, ConfigClass(config))
    assert (found == {"lm_head.weight"}) == tied


def test_layers_that_predict_further_tokens_are_not_in_memory() -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    tensors = [spec(f"model.layers.{layer}.mlp.up_proj.weight", 8, 8) for layer in range(3)]
    tensors.append(spec("mtp.layers.0.mlp.up_proj.weight", 8, 8))
    found = names_not_in_memory(plan_of(*tensors, config=config).decisions, config, ConfigClass(config))
    assert found == {"model.layers.2.mlp.up_proj.weight", "mtp.layers.0.mlp.up_proj.weight"}


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"_class_name": "FluxTransformer2DModel", "num_layers": 2}, ()),
        ({"architecture": "vit_tiny_patch16_224", "num_classes": 10}, None),
    ],
)
def test_projections_of_what_is_no_language_model_are_no_cache(config: dict[str, Any], layers: object) -> None:
    assert read_kv_cache(config, (64, 64)).layers == layers
