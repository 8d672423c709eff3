"""Peak memory does not grow with tensors or shards. It is measured on files of real size in separate processes.

The sources are sparse: gigabytes of zeros that use no disk space.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from int8cli.checkpoint.header import encode_header
from int8cli.checkpoint.tensor import TensorSpec

ROOT = Path(__file__).parents[1]
LIMIT_BYTES = 100 * 10**6
CONVERT = """
import sys
from int8cli import ConvertOptions, convert
convert(sys.argv[1], sys.argv[2], ConvertOptions(outliers="none", threads=4))
"""
# Not ru_maxrss: that begins with the peak of the process that started this one.
MEASURE = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")


def peak_bytes(code: str, *arguments: Path) -> int:
    """Peak resident memory of a fresh interpreter that runs this."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", code + MEASURE, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    return int(done.stdout) * 1024


@pytest.fixture(scope="module")
def torch_bytes() -> int:
    return peak_bytes("import torch")


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """A directory for a source. It is removed at the end, because pytest keeps the directories of three runs."""
    (tmp_path / "source").mkdir()
    yield tmp_path / "source"
    for file in tmp_path.rglob("*"):
        if file.is_file():
            file.unlink()


def write_sparse_safetensors(source: Path, *specs: TensorSpec) -> int:
    """Returns the size of the largest tensor."""
    header, places = encode_header(specs, {"format": "pt"})
    with open(source / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(places[-1].end_bytes)
    (source / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    return max(spec.nbytes for spec in specs)


def converted_bytes(source: Path) -> int:
    return (source.parent / "output" / "model.safetensors").stat().st_size


def test_an_embedding_and_a_linear_of_over_a_gigabyte(source: Path, torch_bytes: int) -> None:
    linear = TensorSpec("layers.0.mlp.up_proj.weight", "BF16", (20_480, 28_672))
    embedding = TensorSpec("embed_tokens.weight", "BF16", (250_880, 3_072))
    assert write_sparse_safetensors(source, linear, embedding) > 7 * LIMIT_BYTES
    assert peak_bytes(CONVERT, source, source.parent / "output") - torch_bytes < LIMIT_BYTES
    assert converted_bytes(source) > linear.nbytes // 2 + embedding.nbytes


def test_a_conv1d_larger_than_the_limit(source: Path, torch_bytes: int) -> None:
    weight = TensorSpec("h.0.mlp.c_fc.weight", "BF16", (4_096, 53_248))
    assert (
        write_sparse_safetensors(source, weight, TensorSpec("h.0.mlp.c_fc.bias", "BF16", (53_248,))) > 2 * LIMIT_BYTES
    )
    assert peak_bytes(CONVERT, source, source.parent / "output") - torch_bytes < LIMIT_BYTES
    assert converted_bytes(source) < weight.nbytes


def test_a_row_larger_than_the_limit(source: Path, torch_bytes: int) -> None:
    weight = TensorSpec("layers.0.mlp.up_proj.weight", "BF16", (1, 220_000_000))
    assert write_sparse_safetensors(source, weight) > 2 * LIMIT_BYTES
    assert peak_bytes(CONVERT, source, source.parent / "output") - torch_bytes < LIMIT_BYTES
    assert converted_bytes(source) < weight.nbytes


def test_a_bin_larger_than_the_limit(source: Path, torch_bytes: int) -> None:
    linear = torch.empty(16_384, 13_312, dtype=torch.bfloat16)
    embedding = torch.empty(4_096, 53_248, dtype=torch.bfloat16).t()  # crosswise in the file
    with torch.serialization.skip_data():
        torch.save(
            {"layers.0.mlp.up_proj.weight": linear, "embed_tokens.weight": embedding}, source / "pytorch_model.bin"
        )
    assert linear.nbytes > 2 * LIMIT_BYTES
    assert peak_bytes(CONVERT, source, source.parent / "output") - torch_bytes < LIMIT_BYTES
    assert converted_bytes(source) > linear.numel() + embedding.nbytes
