"""Show the memory estimate of BLOOM-176B, and what it costs: requests, bytes, seconds.

    python scripts/measure_bloom_estimate.py [DIRECTORY] [--latency-ms 50] [-- ARGUMENTS OF estimate-memory]

Makes the 72 shards of bigscience/bloom with their true shapes as sparse files (352 GB that use no disk space), serves
them from a Hub stand-in on this machine, and runs the command as a user would.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support import hub_stand_in  # noqa: E402

LAYERS, HIDDEN, HEADS, VOCABULARY = 70, 14336, 112, 250880
TOTAL_SIZE = 352_494_542_848
Shapes = dict[str, tuple[int, ...]]


def shards(layers: int = LAYERS, hidden: int = HIDDEN) -> Iterator[tuple[str, Shapes]]:
    """File name and tensors of each shard: 72 for BLOOM itself."""
    contents: list[Shapes] = [
        {"word_embeddings.weight": (VOCABULARY, hidden), **norm("word_embeddings_layernorm", hidden)},
        *(block(layer, hidden) for layer in range(layers)),
        norm("ln_f", hidden),
    ]
    for number, tensors in enumerate(contents, start=1):
        yield f"model_{number:05}-of-{len(contents):05}.safetensors", tensors


def norm(name: str, hidden: int) -> Shapes:
    return {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}


def block(layer: int, hidden: int) -> Shapes:
    def linear(name: str, out_features: int, in_features: int) -> Shapes:
        return {f"h.{layer}.{name}.weight": (out_features, in_features), f"h.{layer}.{name}.bias": (out_features,)}

    return {
        **norm(f"h.{layer}.input_layernorm", hidden),
        **linear("self_attention.query_key_value", 3 * hidden, hidden),
        **linear("self_attention.dense", hidden, hidden),
        **norm(f"h.{layer}.post_attention_layernorm", hidden),
        **linear("mlp.dense_h_to_4h", 4 * hidden, hidden),
        **linear("mlp.dense_4h_to_h", hidden, 4 * hidden),
    }


def write_sparse(path: Path, tensors: Shapes) -> int:
    """Write a bfloat16 safetensors file whose data is a hole. Returns the bytes of its tensors."""
    header, end = {}, 0
    for name, shape in tensors.items():
        begin, count = end, 2
        for length in shape:
            count *= length
        end += count
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def make_bloom(directory: Path, layers: int = LAYERS, hidden: int = HIDDEN) -> int:
    """Returns the bytes of all tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    weight_map, total = {}, 0
    for file_name, tensors in shards(layers, hidden):
        total += write_sparse(directory / file_name, tensors)
        weight_map.update(dict.fromkeys(tensors, file_name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": hidden,
        "n_head": HEADS,
        "n_layer": layers,
        "seq_length": 2048,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    return total


def preset_digests(directory: Path) -> None:
    """Give the stand-in a sha256 for each shard. To compute them, it would have to read 352 GB of zeros."""
    for path in directory.glob("*.safetensors"):
        state = (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        hub_stand_in._sha256_by_state[state] = path.stem.encode().hex().ljust(64, "0")[:64]


def slow_down(latency_s: float) -> None:
    """Delay every answer, like a real network."""
    answer_at_once = hub_stand_in.Handler._route

    def answer_late(handler: hub_stand_in.Handler) -> None:
        time.sleep(latency_s)
        answer_at_once(handler)

    setattr(hub_stand_in.Handler, "_route", answer_late)  # noqa: B010  # an assignment is an error of types


def measure(directory: Path, latency_ms: float, arguments: list[str]) -> None:
    with hub_stand_in.HubStandIn() as hub, tempfile.TemporaryDirectory() as home:
        hub.add_repo("bigscience/bloom", directory)
        slow_down(latency_ms / 1000)
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": home, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "int8cli", "estimate-memory", "bigscience/bloom", *arguments]
        started = time.monotonic()
        subprocess.run(command, env=environment, check=True)
        elapsed = time.monotonic() - started
        sent = sum(request.bytes_sent for request in hub.requests)
        print(f"\n{len(hub.requests)} requests, {sent:,} bytes of bodies, {elapsed:.2f} s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "bloom-shapes")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="added to every answer of the stand-in")
    ours = sys.argv[1:]
    split = ours.index("--") if "--" in ours else len(ours)
    options = parser.parse_args(ours[:split])
    total = make_bloom(options.directory)
    assert total == TOTAL_SIZE, total
    preset_digests(options.directory)
    measure(options.directory, options.latency_ms, ours[split + 1 :])


if __name__ == "__main__":
    main()
