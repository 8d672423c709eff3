"""Measure how much disk a conversion takes that is streamed from the Hub to the Hub, shard by shard.

    python scripts/measure_streaming_disk.py [--divide 28] [--json]

Makes a BLOOM with the names and proportions of bigscience/bloom's 72 shards, its width and vocabulary divided, serves
it from a Hub stand-in on this machine, and runs `int8cli convert --push-to-hub … --no-keep-output` as a user would.
Looks at the user's directory, the Hub cache included, every few milliseconds and at every request. Then converts once
more without pushing, and compares all files with those of the repository.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import measure_bloom_estimate as bloom
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.hub_uploads import WritableHub  # noqa: E402

SOURCE, REPO, TOKEN = "bigscience/bloom", "me/bloom-int8", "hf_stand_in"
INTERVAL_S = 0.003
# A hidden size that CPU kernels handle needs 16 columns at least.
LARGEST_DIVISOR = bloom.HIDDEN // 16


@dataclass(frozen=True)
class Figures:
    """Bytes. `peak` is the most that the user's directory took on the disk, `left` what it takes at the end."""

    shards: int
    source_bytes: int
    output_bytes: int
    largest_source_shard_bytes: int
    largest_output_shard_bytes: int
    peak_bytes: int
    left_bytes: int
    peak_without_bytes: int
    same_files: int


class Watch:
    """The most bytes that a directory takes on the disk, by its blocks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stop = threading.Event()
        self.peak_bytes = 0

    def look(self) -> int:
        total = 0
        for parent, _, names in os.walk(self._directory):
            for name in names:
                try:
                    total += os.lstat(os.path.join(parent, name)).st_blocks * 512
                except FileNotFoundError:  # removed in between
                    continue
        self.peak_bytes = max(self.peak_bytes, total)
        return total

    @contextmanager
    def watching(self) -> Iterator[None]:
        def run() -> None:
            while not self._stop.wait(INTERVAL_S):
                self.look()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


def make_bloom(directory: Path, divisor: int) -> None:
    """Write a small BLOOM in 72 shards. Random weights: zeros would take no space."""
    directory.mkdir(parents=True)
    bloom.HIDDEN, bloom.VOCABULARY = bloom.HIDDEN // divisor, bloom.VOCABULARY // divisor
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for file_name, shapes in bloom.shards():
        tensors = {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": bloom.HIDDEN,
        "n_head": 8,
        "n_layer": bloom.LAYERS,
        "vocab_size": bloom.VOCABULARY,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))


def convert(hub: WritableHub, home: Path, *options: str) -> Watch:
    """Run the command in a directory of its own, which is watched."""
    home.mkdir()
    watch = Watch(home)
    hub.watch = lambda step, when: bool(watch.look() < 0)
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "int8cli", "convert", SOURCE, "-o", "bloom-int8", "--outliers", "none", "-q"]
    with watch.watching():
        subprocess.run([*command, *options], cwd=home, env=environment, check=True)
    return watch


def measure(root: Path, divisor: int) -> Figures:
    make_bloom(root / "source", divisor)
    sizes = [path.stat().st_size for path in (root / "source").glob("*.safetensors")]
    with WritableHub(root / "hub", {TOKEN: {"me"}}) as hub:
        hub.add_repo(SOURCE, root / "source")
        streamed = convert(hub, root / "streamed", "--push-to-hub", REPO, "--no-keep-output")
        left_bytes = streamed.look()
        local = convert(hub, root / "local")
        pushed = hub.files_of(REPO)
    output = root / "local" / "bloom-int8"
    files = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    assert files.keys() == pushed.keys(), files.keys() ^ pushed.keys()
    same = sum(path.read_bytes() == pushed[name] for name, path in files.items())
    assert same == len(files)
    outputs = [path.stat().st_size for name, path in files.items() if name.endswith(".safetensors")]
    return Figures(
        shards=len(sizes),
        source_bytes=sum(sizes),
        output_bytes=sum(outputs),
        largest_source_shard_bytes=max(sizes),
        largest_output_shard_bytes=max(outputs),
        peak_bytes=streamed.peak_bytes,
        left_bytes=left_bytes,
        peak_without_bytes=local.peak_bytes,
        same_files=same,
    )


def shown(found: Figures) -> Iterator[str]:
    """The figures as lines, and as shares of the source."""

    def line(what: str, size_bytes: int) -> str:
        return f"{what:<48} {size_bytes / 1e6:>9,.1f} MB {100 * size_bytes / found.source_bytes:>6.1f} %"

    yield line(f"source, {found.shards} shards", found.source_bytes)
    yield line("output", found.output_bytes)
    yield line("largest source shard", found.largest_source_shard_bytes)
    yield line("largest output shard", found.largest_output_shard_bytes)
    yield line("most on the disk, --push-to-hub --no-keep-output", found.peak_bytes)
    yield line("left at the end", found.left_bytes)
    yield line("most on the disk without pushing", found.peak_without_bytes)
    yield f"{found.same_files} files in the repository, all equal to those of the conversion without pushing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divide", type=int, default=28, help=f"up to {LARGEST_DIVISOR}; 28 makes 450 MB")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        found = measure(Path(root), options.divide)
    print(json.dumps(asdict(found), indent=2) if options.json else "\n".join(shown(found)))


if __name__ == "__main__":
    main()
