"""Measure how the time of a conversion grows with the number of shards, with `--outliers none` and `weights`.

Each shard of these checkpoints is one tiny block, so the overhead per shard dominates. CPU time should be proportional
to the number of shards. If it grows faster, each shard causes work on earlier shards. Wall time is mostly fsync.

    python scripts/measure_shard_growth.py 100 400 --workers 1
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH = 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
}
LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def make_model(directory: Path, shards: int) -> None:
    """Write a Llama with one block per shard. transformers would need the whole model in memory."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for index in range(shards):
        block = f"model.layers.{index}"
        tensors = {f"{block}.{name}.weight": torch.randn(WIDTH, WIDTH, generator=generator) for name in LINEARS}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{norm}.weight"] = torch.rand(WIDTH, generator=generator)
        if index == 0:
            tensors["model.embed_tokens.weight"] = torch.randn(32, WIDTH, generator=generator)
        if index == shards - 1:
            tensors["model.norm.weight"] = torch.ones(WIDTH)
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    document = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document))
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": shards}))


def measure(model: Path, output: Path, outliers: str, workers: int) -> tuple[float, float]:
    """Wall time and CPU time in seconds. CPU time does not include worker processes."""
    command = ["convert", model, "--outliers", outliers, "--workers", workers, "-q", "-o", output]
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "int8cli", *map(str, command)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=int, nargs="+")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    print("shards  outliers  wall, s  CPU, s")
    for shards in options.shards:
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            make_model(place / "model", shards)
            for outliers in ("none", "weights"):
                wall, cpu = measure(place / "model", place / outliers, outliers, options.workers)
                print(f"{shards:6}  {outliers:8}  {wall:7.1f}  {cpu:6.1f}", flush=True)


if __name__ == "__main__":
    main()
