"""Measure what a conversion costs against copying the same files: time in turn (A B A B …), peak memory, sizes.

Makes a checkpoint of random bfloat16 weights at the shapes of Llama-2-7B's blocks, one block a shard, converts and
copies it in turn, and prints medians and their ratio. Both sides end with their data on the disk (fsync, sync).

    python scripts/benchmark.py --gigabytes 4 --runs 3 --directory /scratch
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HIDDEN, FEED_FORWARD = 4096, 11008
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
    "mlp.up_proj": (FEED_FORWARD, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
}
IMPORT_TORCH = "import torch"


def make_checkpoint(directory: Path, gigabytes: float) -> None:
    """Write blocks until there are `gigabytes` of them."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    block = {
        name: torch.randn(shape, generator=generator, dtype=torch.float32).mul_(0.02).bfloat16()
        for name, shape in SHAPES.items()
    }
    count = max(1, round(gigabytes * 1e9 / sum(weight.nbytes for weight in block.values())))
    weight_map = {}
    for layer in range(count):
        shard = f"model-{layer + 1:05d}-of-{count:05d}.safetensors"
        tensors = {f"model.layers.{layer}.{name}.weight": weight for name, weight in block.items()}
        save_file(tensors, directory / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def convert(source: Path, output: Path) -> tuple[float, int]:
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    return timed([sys.executable, "-m", "int8cli", "convert", str(source), "-o", str(output), "--quiet"])


def copy(source: Path, output: Path) -> float:
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    seconds, _ = timed(["cp", "-r", str(source), str(output)])
    start = time.perf_counter()
    os.sync()
    return seconds + time.perf_counter() - start


def measure(scratch: Path, gigabytes: float, runs: int) -> None:
    source = scratch / "source"
    # In a process of its own: a child's peak memory begins with that of the process that starts it.
    maker = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(source, gigabytes))
    maker.start()
    maker.join()
    size_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    for file in source.iterdir():
        subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)  # both sides start from a warm cache
    import_s, import_bytes = timed([sys.executable, "-c", IMPORT_TORCH])
    converts, copies, peaks = [], [], []
    for _ in range(runs):
        seconds, peak_bytes = convert(source, scratch / "int8")
        converts.append(seconds)
        peaks.append(peak_bytes)
        copies.append(copy(source, scratch / "copy"))
    written = sum(file.stat().st_size for file in (scratch / "int8").glob("*.safetensors"))
    ratios = [a / b for a, b in zip(converts, copies, strict=True)]
    print(
        f"{size_bytes / 1e9:6.2f} GB → {written / 1e9:5.2f} GB | "
        f"convert {statistics.median(converts):6.2f} s | cp and sync {statistics.median(copies):6.2f} s | "
        f"ratio {statistics.median(ratios):.2f} | peak over torch {(max(peaks) - import_bytes) / 1e6:.0f} MB "
        f"(import alone {import_s:.1f} s, {import_bytes / 1e6:.0f} MB)"
    )
    shutil.rmtree(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2.0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None, help="where to write; the system's temporary directory")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {version('torch')}, medians of {arguments.runs} runs in turn")
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
            measure(Path(scratch), gigabytes, arguments.runs)


if __name__ == "__main__":
    main()
