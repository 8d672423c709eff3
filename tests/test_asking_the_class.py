"""Sizes that only a configuration class of transformers knows: asked where it matters, and never guessed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import Tiny, save_by_hand
from test_kv_cache import BATCH, BEFORE_5_23, ENCODER_TOKENS, TOKENS, WITH_CACHE, config_of, measured_bytes

from int8cli import EstimateOptions, estimate_memory
from int8cli.estimate import asking
from int8cli.estimate.asking import ConfigClass
from int8cli.estimate.class_cache import kv_cache_of
from int8cli.estimate.kv_cache import KvCache, read_kv_cache
from int8cli.loaders.config_class import NoConfigClassError, completed_config
from int8cli.loaders.transformers_versions import release

# Fields that files on the Hub leave out, alone or together.
LEFT_OUT = (
    (),
    ("head_dim",),
    ("num_key_value_heads",),
    ("head_dim", "num_key_value_heads"),
    ("sliding_window",),
    ("attention_chunk_size", "use_sliding_window", "multi_query", "d_kv"),
)


def cases() -> list[tuple[str, tuple[str, ...]]]:
    """Each architecture as its arguments alone describe it, and with fewer of them."""
    return [
        (name, left_out)
        for name, tiny in WITH_CACHE.items()
        for left_out in LEFT_OUT
        if not left_out or any(field in tiny.arguments for field in left_out)
    ]


def size(cache: KvCache) -> int | None:
    encoder_tokens = cache.encoder_tokens or ENCODER_TOKENS
    if cache.layers is None:
        return None
    return BATCH * sum(layer.bytes(TOKENS, encoder_tokens, 2) for layer in cache.layers)


def stated_config(tiny: Tiny) -> dict[str, Any]:
    """A config.json of the arguments alone: all else is left to the class."""
    model_type = getattr(transformers, tiny.config).model_type
    return json.loads(json.dumps({"model_type": model_type, "architectures": [tiny.model], **tiny.arguments}))


@pytest.mark.parametrize(("name", "left_out"), cases())
def test_asked_or_not_the_size_is_that_of_transformers_or_unknown(name: str, left_out: tuple[str, ...]) -> None:
    full = WITH_CACHE[name]
    tiny = Tiny(full.model, full.config, {k: v for k, v in full.arguments.items() if k not in left_out})
    if name in BEFORE_5_23 and release(transformers.__version__) < release("5.23.0"):
        pytest.skip(f"{name} {BEFORE_5_23[name]} in transformers {transformers.__version__}")
    try:
        config_of(tiny)  # skips what transformers lacks
        measured = measured_bytes(tiny)
    except Exception as error:  # the class's own number does not fit the others: no such model exists
        pytest.skip(f"no such model: {type(error).__name__}")
    stated = stated_config(tiny)
    unasked = read_kv_cache(stated)
    assert size(unasked) == measured or unasked.assumed or unasked.answerable
    assert size(read_kv_cache(completed_config(stated))) == measured


@pytest.mark.parametrize("name", WITH_CACHE)
def test_a_config_as_transformers_writes_it_leaves_nothing_to_ask(name: str) -> None:
    cache = read_kv_cache(config_of(WITH_CACHE[name])[1])
    assert not cache.assumed
    assert not cache.answerable


GEMMA_3: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 6, "sliding_window": 1024},
}
# Sizes in one projection whose parts the headers do not tell.
FUSED: dict[str, Any] = {"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 16, "num_hidden_layers": 2}


def test_transformers_is_asked_in_a_process_of_its_own_and_runs_no_code_of_the_repository(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(96, 64)}
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.all_proj.weight"] = torch.zeros(512, 64)
    config = {**FUSED, "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    source = save_by_hand(tmp_path / "source", tensors, config)
    (source / "configuration_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    cache = estimate_memory(source, EstimateOptions()).estimate.cache
    made: Any = transformers.Qwen3Config(**{name: value for name, value in FUSED.items() if name != "model_type"})
    assert cache.bytes_a_token(2) == 2 * 2 * 2 * made.num_key_value_heads * made.head_dim
    assert not (tmp_path / "ran").exists()


def test_a_text_config_without_sizes_is_completed_by_its_class() -> None:
    """As published for LLaVA 1.5: `text_config` names a type and a vocabulary, and its class has all else."""
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}, "vision_config": {}}
    assert read_kv_cache(config).answerable
    assert read_kv_cache(completed_config(config)).bytes_a_token(2) == 32 * 2 * 4096 * 2


def test_gemma_3_has_its_width_of_heads_from_the_headers_or_from_its_class() -> None:
    unasked = read_kv_cache(GEMMA_3)
    assert unasked.layers is None
    assert unasked.answerable
    asked = read_kv_cache(completed_config(GEMMA_3))
    assert asked.bytes_a_token(2) == 6 * 2 * 4 * 256 * 2
    assert [layer.window for layer in asked.layers or ()] == [1023] * 5 + [None]
    by_rows = read_kv_cache(GEMMA_3, (2048,) * 6)
    assert by_rows.layers == asked.layers
    assert not by_rows.assumed


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ({"model_type": "novel", "hidden_size": 64, "num_hidden_layers": 2}, (96, 96)),
        ({"model_type": "novel", "hidden_size": 64}, (96, 96)),
        ({"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 96}}, (96, 96)),
        ({"model_type": "gemma4_text", "num_hidden_layers": 2, "global_head_dim": 512}, (96, 96)),
    ],
)
def test_the_headers_settle_what_the_config_leaves_out(config: dict[str, Any], rows: tuple[int, ...]) -> None:
    cache = read_kv_cache(config, rows)
    assert cache.bytes_a_token(2) == 2 * 2 * 96
    assert not cache.assumed


PROGRAMS = {
    "ends": "raise SystemExit(3)",
    "is killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "prints": "print('Loading…')",
    "lists": "print([1, 2])",
    "waits": "import time; time.sleep(60)",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_transformers_that_fails_is_no_answer(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_PROGRAM", PROGRAMS[program])
    monkeypatch.setattr(asking, "ANSWER_LIMIT_S", 0.5 if program == "waits" else 60.0)
    cache = kv_cache_of(FUSED, (), ConfigClass(FUSED))
    assert cache.layers is None
    assert cache.reason.startswith("config.json has no num_key_value_heads; transformers ")


def test_without_transformers_what_is_left_to_the_class_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_PACKAGE", "transformers_that_is_not_there")
    cache = kv_cache_of(FUSED, (), ConfigClass(FUSED))
    assert cache.layers is None
    assert cache.reason == "config.json has no num_key_value_heads; transformers_that_is_not_there is not installed"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**FUSED, "model_type": "novel"}, "does not know the model type 'novel'"),
        ({**FUSED, "num_hidden_layers": "many"}, "rejects config.json"),  # transformers 5.0 takes other words
    ],
)
def test_a_class_that_does_not_answer_gives_its_reason(config: dict[str, Any], words: str) -> None:
    with pytest.raises(NoConfigClassError, match=words):
        completed_config(config)


def test_the_class_is_asked_at_most_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def ask(config: object) -> str:
        asked.append(config)
        return "no"

    monkeypatch.setattr(asking, "_ask", ask)
    config_class = ConfigClass(FUSED)
    for _ in range(2):
        kv_cache_of(FUSED, (), config_class)
    assert asked == [FUSED]


@pytest.mark.parametrize("config", [FUSED, GEMMA_3])
def test_nothing_is_asked_that_the_headers_tell(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_ask", pytest.fail)
    rows = (2048,) * (2 if config is FUSED else 6)
    assert kv_cache_of(config, rows, ConfigClass(config)).layers is not None
