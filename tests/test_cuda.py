"""Conversion on a GPU, if there is one: the bytes equal those of the CPU, the figures up to the order of summation.

Without one, only the basis of the GPU's buffers is tested.
"""

import math
from pathlib import Path

import pytest
import torch
from support.checkpoints import read_json, save_by_hand, save_tiny
from support.program import CONVERT, run

import int8cli
from int8cli.conversion.buffers import bytes_of
from int8cli.llm_int8.matmul import INPUT_SCHEMES, Int8Weight, int8_product, llm_int8_linear
from int8cli.llm_int8.quantize import quantize_rowwise
from int8cli.planning.blocks import BLOCK_ELEMENTS
from int8cli.runtime.linear import Int8Linear

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
FIGURES = ("max_abs_error", "sum_squared_error", "sum_squared_weight", "sum_abs_data")


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 0.05) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * std).to(dtype)


def convert_on(device: str, source: Path, *options: str) -> Path:
    output = source.with_name(f"on-{device}")
    outcome = run(*CONVERT, source, "-o", output, "--device", device, "--quiet", *options, cwd=source.parent)
    assert outcome.code == 0, outcome.err
    return output


def assert_alike(gpu: Path, cpu: Path) -> None:
    names = sorted(file.relative_to(cpu) for file in cpu.rglob("*.safetensors"))
    assert names == sorted(file.relative_to(gpu) for file in gpu.rglob("*.safetensors"))
    for name in names:
        assert (gpu / name).read_bytes() == (cpu / name).read_bytes()
    there, here = (
        {layer["name"]: layer for layer in read_json(directory / "int8" / "report.json")["layers"]}
        for directory in (gpu, cpu)
    )
    assert there.keys() == here.keys()
    for name, layer in here.items():
        assert all(math.isclose(there[name][figure], layer[figure], rel_tol=1e-5) for figure in FIGURES)


def test_the_bytes_of_a_tensor_are_its_own_memory() -> None:
    tensor = torch.zeros(5, dtype=torch.uint8)
    view = bytes_of(tensor)
    view[1:3] = b"ab"
    assert tensor.tolist() == [0, 97, 98, 0, 0]
    assert (view.format, view.nbytes, view.readonly) == ("B", 5, False)


@on_gpu
@pytest.mark.parametrize("options", [(), ("--layout", "compressed-tensors"), ("--outliers", "weights")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gpu_writes_the_bytes_of_the_processor(dtype: torch.dtype, options: tuple[str, ...], tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", dtype)
    assert_alike(convert_on("cuda", source, *options), convert_on("cpu", source, *options))


@on_gpu
def test_rows_wider_than_a_block_and_large_tensors_give_the_same_output(tmp_path: Path) -> None:
    rows_of_every_size = normal(3000, 700, dtype=torch.float32, std=1.0) * torch.logspace(-8, 4, 3000)[:, None]
    tensors = {
        "layers.0.mlp.up_proj.weight": normal(3, BLOCK_ELEMENTS + 9),
        "layers.0.mlp.down_proj.weight": rows_of_every_size.bfloat16(),
        "layers.0.self_attn.q_proj.weight": torch.zeros(5, 700, dtype=torch.bfloat16),
        "layers.0.self_attn.k_proj.weight": normal(9000, 700),
    }
    source = save_by_hand(tmp_path / "source", tensors)
    assert_alike(convert_on("cuda", source), convert_on("cpu", source))


@on_gpu
def test_conv1d_weights_give_the_same_output(tmp_path: Path) -> None:
    source = save_tiny("gpt2", tmp_path / "source", torch.float16)
    assert_alike(convert_on("cuda", source), convert_on("cpu", source))


@on_gpu
@pytest.mark.parametrize("tokens", [1, 8, 17, 40])
def test_the_product_on_a_gpu_is_that_of_the_processor(tokens: int) -> None:
    """Integers are equal; what follows rounds in the same order, but sums over stored columns in another."""
    inputs, weight = normal(tokens, 1032, std=1.0), normal(77, 1032)
    data, row_absmax = quantize_rowwise(weight)
    stored = Int8Weight.of(data, row_absmax, torch.tensor([3, 900]), weight[:, [3, 900]])
    parts = (data, stored.step, stored.row_sums, stored.outlier_cols, stored.outlier_weight)
    there = Int8Weight(*(each.cuda() for each in parts))
    for scheme in INPUT_SCHEMES:
        found = llm_int8_linear(inputs.cuda(), there, scheme).cpu()
        torch.testing.assert_close(found, llm_int8_linear(inputs, stored, scheme), rtol=1e-5, atol=1e-5)
    left = data[:tokens]
    assert torch.equal(int8_product(left.cuda(), data.cuda()).cpu(), int8_product(left, data))


@on_gpu
def test_a_model_whose_blocks_are_brought_to_a_gpu_computes_what_one_on_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny("llama-biased", tmp_path / "source", torch.float32)
    output = convert_on("cpu", source, "--outliers", "none")
    ids = torch.arange(5, 12, device="cuda")[None]
    whole = int8cli.load_model(output)
    int8 = sum(module.weight.numel() for module in whole.modules() if isinstance(module, Int8Linear))
    monkeypatch.setattr("int8cli.runtime.placement._BLOCKS_AT_ONCE", 0)
    fixed = whole.get_memory_footprint() - int8
    with torch.no_grad():
        expected = whole(ids).logits
        for ram in (int8, 0):  # all in RAM, all on the disk
            limits = {0: fixed, "cpu": ram}
            model = int8cli.load_model(output, device_map="auto", max_memory=limits)
            assert set(model.hf_device_map.values()) == {"cuda", "cpu" if ram else "disk"}
            for _ in range(2):
                assert torch.equal(model(ids).logits, expected)


@on_gpu
def test_gradients_on_a_gpu_are_those_of_the_processor(tmp_path: Path) -> None:
    source = save_tiny("llama-biased", tmp_path / "source", torch.float32)
    output = convert_on("cpu", source, "--outliers", "none")
    layer = next(m for m in int8cli.load_model(output, device="cpu").modules() if isinstance(m, Int8Linear))
    inputs = normal(5, layer.in_features, dtype=torch.float32, std=1.0)
    found = []
    for device in ("cpu", "cuda"):
        leaf = inputs.to(device).requires_grad_()
        layer.to(device)(leaf).sum().backward()
        assert leaf.grad is not None
        found.append(leaf.grad.cpu())
    torch.testing.assert_close(*found)
