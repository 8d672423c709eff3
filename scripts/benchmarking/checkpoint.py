"""Writes the checkpoints for the benchmark: random weights of realistic scale, in the shapes of BLOOM and Llama.

This is a separate program, because numpy and the weights would count towards the peak memory of the processes that the
benchmark starts afterwards. Needs numpy, and 64 MB of memory for any size.

    python scripts/benchmarking/checkpoint.py bloom /scratch/source --gigabytes 8
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy

BLOOM_HIDDEN = 14336  # of BLOOM-176B, one block of which is 4.93 GB
LLAMA_HIDDEN, LLAMA_FEED_FORWARD = 4096, 11008  # of Llama-2-7B, one block of which is 0.40 GB
VOCABULARY = 1024
POOL = 1 << 24
STD = 0.02

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """A model to write: the shapes of the tensors in each shard, the dtype, and the config."""

    shards: tuple[Shapes, ...]
    dtype: str
    config: dict[str, object]


def bloom(gigabytes: float) -> Model:
    """Blocks of BLOOM, one per shard, in bfloat16. They are as wide as in BLOOM-176B, or narrower to fit the size."""
    block_bytes = 24 * BLOOM_HIDDEN**2
    blocks = max(1, math.ceil(gigabytes * 1e9 / block_bytes - 0.1))
    hidden = min(BLOOM_HIDDEN, max(1, round(math.sqrt(gigabytes * 1e9 / blocks / 24) / 128)) * 128)
    embedding = {
        "word_embeddings.weight": (VOCABULARY, hidden),
        **_weight_and_bias("word_embeddings_layernorm", hidden),
    }
    shards = [_bloom_block(index, hidden) for index in range(blocks)]
    config = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": hidden,
        "n_layer": blocks,
        "n_head": hidden // 128,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
    }
    return Model((embedding, *shards, _weight_and_bias("ln_f", hidden)), "BF16", config)


def llama(gigabytes: float) -> Model:
    """Blocks of Llama-2-7B, one per shard, in float16. They are narrower if the size is less than one block."""
    block_bytes = 2 * (4 * LLAMA_HIDDEN**2 + 3 * LLAMA_HIDDEN * LLAMA_FEED_FORWARD)
    blocks = max(1, round(gigabytes * 1e9 / block_bytes))
    scale = min(1.0, math.sqrt(gigabytes * 1e9 / block_bytes))
    hidden = max(1, round(LLAMA_HIDDEN * scale / 128)) * 128
    feed_forward = max(1, round(LLAMA_FEED_FORWARD * scale / 128)) * 128
    embedding: Shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    head: Shapes = {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
        "num_hidden_layers": blocks,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": VOCABULARY,
        "torch_dtype": "float16",
    }
    blocks_shapes = [_llama_block(index, hidden, feed_forward) for index in range(blocks)]
    return Model((embedding, *blocks_shapes, head), "F16", config)


MODELS: dict[str, Callable[[float], Model]] = {"bloom": bloom, "llama": llama}


def _weight_and_bias(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _bloom_block(index: int, hidden: int) -> Shapes:
    linears = {
        "self_attention.query_key_value": (3 * hidden, hidden),
        "self_attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (4 * hidden, hidden),
        "mlp.dense_4h_to_h": (hidden, 4 * hidden),
    }
    block: Shapes = {}
    for name, shape in linears.items():
        block |= {f"h.{index}.{name}.weight": shape, f"h.{index}.{name}.bias": shape[:1]}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        block |= _weight_and_bias(f"h.{index}.{norm}", hidden)
    return block


def _llama_block(index: int, hidden: int, feed_forward: int) -> Shapes:
    linears: Shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    linears |= {f"mlp.{name}_proj": (feed_forward, hidden) for name in ("gate", "up")}
    linears["mlp.down_proj"] = (hidden, feed_forward)
    linears |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    return {f"model.layers.{index}.{name}.weight": shape for name, shape in linears.items()}


class _Weights:
    """Normally distributed weights as bytes of a 16-bit dtype. Drawn once, then reused from random offsets."""

    def __init__(self, dtype: str) -> None:
        self._random = numpy.random.default_rng(0)
        drawn = self._random.standard_normal(POOL, dtype=numpy.float32) * numpy.float32(STD)
        if dtype == "F16":
            self._pool = drawn.astype("<f2")
        else:  # bfloat16 is the upper half of float32, here truncated instead of rounded
            self._pool = (drawn.view("<u4") >> 16).astype("<u2")

    def deal(self, count: int) -> Iterator[memoryview]:
        while count:
            begin = int(self._random.integers(POOL // 2))
            piece = self._pool[begin : begin + min(count, POOL - begin)]
            count -= len(piece)
            yield piece.view(numpy.uint8).data


def write_checkpoint(directory: Path, model: Model) -> None:
    """Write shards, index, config and a tokenizer of single words, in the form of a Hub repository."""
    directory.mkdir(parents=True)
    weights = _Weights(model.dtype)
    weight_map = {}
    for number, shapes in enumerate(model.shards, start=1):
        name = f"model-{number:05}-of-{len(model.shards):05}.safetensors"
        _write_shard(directory / name, shapes, model.dtype, weights)
        weight_map.update(dict.fromkeys(shapes, name))
    total = 2 * sum(math.prod(shape) for shapes in model.shards for shape in shapes.values())
    _write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    _write_json(directory / "config.json", model.config)
    _write_tokenizer(directory)


def _write_shard(path: Path, shapes: Shapes, dtype: str, weights: _Weights) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape in shapes.values():
            for piece in weights.deal(math.prod(shape)):
                file.write(piece)


def _write_tokenizer(directory: Path) -> None:
    words = ["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(VOCABULARY - 3))]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    special = [
        {"id": number, "content": word, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, word in enumerate(words[:3])
    ]
    _write_json(directory / "tokenizer.json", {"version": "1.0", "added_tokens": special, "model": model})
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    _write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gigabytes", type=float, required=True)
    arguments = parser.parse_args()
    write_checkpoint(arguments.directory, MODELS[arguments.model](arguments.gigabytes))


if __name__ == "__main__":
    main()
