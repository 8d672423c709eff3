"""Models larger than what they may take: the same results, in less memory than their weights."""

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import WITHOUT_COLUMNS, save_tiny
from support.progress import CoherentProgress
from test_runtime import IDS, run, store_columns

import int8cli
from int8cli import convert
from int8cli.errors import NotEnoughMemoryError, OptionError, UnsupportedOperationError
from int8cli.runtime.linear import Int8Linear
from int8cli.runtime.placement import MemoryLimits, memory_limits, place_blocks
from int8cli.runtime.stopping import ForwardStopped, stoppable

BLOCKS = {"a": 10, "b": 10, "c": 10, "d": 10}


def places(device_bytes: int, ram_bytes: int | None = None) -> str:
    found = place_blocks(BLOCKS, 5, MemoryLimits(device_bytes, ram_bytes))
    assert list(found.places) == list(BLOCKS)
    return " ".join(found.places.values())


# Placing


def test_whole_blocks_are_on_the_device_as_far_as_they_fit_and_then_on_the_disk() -> None:
    assert places(45) == "device device device device"
    # Two blocks that are brought need room as well.
    assert places(44) == "device disk disk disk"
    assert places(25) == "disk disk disk disk"


def test_between_a_gpu_and_the_disk_there_is_ram() -> None:
    assert places(35, 30) == "device ram ram ram"
    assert places(35, 29) == "device disk disk disk"
    assert places(25, 40) == "ram ram ram ram"
    assert places(25, 39) == "ram disk disk disk"


def test_what_does_not_fit_at_all_is_an_error_with_numbers() -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"take 5 B and two blocks 20 B, but only 24 B are allowed"):
        places(24)


def test_limits_are_sizes_of_known_devices() -> None:
    assert memory_limits("cpu", {"cpu": "2GB"}) == MemoryLimits(2 * 10**9, None)
    assert memory_limits("cuda", {"cpu": "2GiB", 0: 5}) == MemoryLimits(5, 2 * 2**30)
    assert memory_limits("cpu", None).device_bytes > 0
    with pytest.raises(OptionError, match="0 is not a device"):
        memory_limits("cpu", {0: "2GB"})
    with pytest.raises(OptionError, match="1 is not a device"):
        memory_limits("cuda", {1: "2GB"})
    for bad in ("much", 1e9, None, -5):
        with pytest.raises(OptionError, match=f"{bad!r} is not a size"):
            memory_limits("cpu", {"cpu": bad})  # type: ignore[dict-item]
    with pytest.raises(OptionError, match="'8GB' does not say for which device"):
        memory_limits("cpu", "8GB")  # type: ignore[arg-type]


# Running


def converted(architecture: str, directory: Path) -> Path:
    source = save_tiny(architecture, directory / "source", torch.float32)
    convert(source, directory / "out", WITHOUT_COLUMNS)
    store_columns(source, directory / "out")
    return directory / "out"


def fixed_bytes(directory: Path) -> int:
    """What a model takes in memory beside the int8 weights of its blocks."""
    model = int8cli.load_model(directory, device="cpu")
    int8 = sum(module.weight.numel() for module in model.modules() if isinstance(module, Int8Linear))
    return int(model.get_memory_footprint()) - int8


def offloaded(directory: Path, **options: Any) -> Any:
    """With all blocks on the disk: these models have two, which would both be in memory while one is read ahead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("int8cli.runtime.placement._BLOCKS_AT_ONCE", 0)
        limit: dict[int | str, int | str] = {"cpu": fixed_bytes(directory)}
        return int8cli.load_model(directory, device="cpu", device_map="auto", max_memory=limit, **options)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "bloom", "t5", "qwen3_moe", "bart"])
def test_a_model_on_the_disk_computes_what_one_in_memory_does(architecture: str, tmp_path: Path) -> None:
    directory = converted(architecture, tmp_path)
    model = offloaded(directory)
    assert "disk" in model.hf_device_map.values()
    expected = run(int8cli.load_model(directory, device="cpu")).logits
    for _ in range(2):
        assert torch.equal(run(model).logits, expected)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted("llama-biased", tmp_path_factory.mktemp("llama"))


def test_weights_are_here_only_while_their_block_runs(llama: Path) -> None:
    model = offloaded(llama)
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    here: list[int] = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: here.append(sum(m._buffers["weight"] is not None for m in layers)))
    run(model)
    assert here == [len(layers) // 2] * len(layers)
    assert all(layer._buffers["weight"] is None for layer in layers)


def test_generation_is_the_same_and_the_speed_is_told_beforehand(llama: Path) -> None:
    progress = CoherentProgress()
    model = offloaded(llama, progress=progress, offload_folder="unused")
    [note] = progress.notes
    assert note.startswith("of 2 blocks, 2 (")
    assert " from the disk at " in note
    assert " are loaded for each token: " in note
    options: dict[str, Any] = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), int8cli.load_model(llama, device="cpu").generate(IDS, **options))


def test_what_fits_is_not_offloaded_and_nothing_is_said(llama: Path) -> None:
    progress = CoherentProgress()
    model = int8cli.load_model(llama, device="cpu", device_map="auto", progress=progress)
    assert progress.notes == []
    assert all(m._buffers["weight"] is not None for m in model.modules() if isinstance(m, Int8Linear))


def test_gradients_reach_the_inputs_of_a_model_on_the_disk(llama: Path) -> None:
    found = []
    for model in (offloaded(llama), int8cli.load_model(llama, device="cpu")):
        inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=inputs).logits.sum().backward()
        found.append(inputs.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("at", range(1, 8))
def test_a_model_that_is_stopped_before_any_block_runs_again(at: int, llama: Path) -> None:
    """What was read ahead for the block that did not run is not taken for another one."""
    expected = run(int8cli.load_model(llama, device="cpu")).logits
    model, calls = offloaded(llama), itertools.count(1)
    with stoppable(model, lambda: next(calls) >= at):
        for _ in range((at - 1) // 3):  # a pass asks three times: before the model and each of its two blocks
            run(model)
        with pytest.raises(ForwardStopped):
            run(model)
    assert all(m._buffers["weight"] is None for m in model.modules() if isinstance(m, Int8Linear))
    for _ in range(2):
        assert torch.equal(run(model).logits, expected)
    assert next(calls) == at + 1


def refusals() -> Iterator[Any]:
    yield pytest.param(copy.deepcopy, id="copy")
    yield pytest.param(lambda model: model.dequantize(), id="dequantize")
    yield pytest.param(lambda model: model.save_pretrained("never"), id="save")


@pytest.mark.parametrize("use", list(refusals()))
def test_what_needs_all_weights_at_once_is_refused(use: Any, llama: Path) -> None:
    with pytest.raises(UnsupportedOperationError):
        use(offloaded(llama))


def test_other_device_maps_are_refused(llama: Path) -> None:
    with pytest.raises(OptionError, match="'balanced' is not 'auto'"):
        int8cli.load_model(llama, device_map="balanced")
    with pytest.raises(NotEnoughMemoryError, match="are allowed"):
        int8cli.load_model(llama, device="cpu", max_memory={"cpu": 1000})


# Measured

HIDDEN, LAYERS = 1024, 32
# Loads a model under a limit on the address space, and says how much resident memory it took beside what was there.
UNDER_A_LIMIT = """
import json, resource, sys
import torch, transformers, int8cli
from int8cli.runtime import load, offload, quantizer
directory, allowed, headroom = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
ids = torch.arange(8)[None]
torch._int_mm(torch.zeros(8, 8, dtype=torch.int8), torch.zeros(8, 8, dtype=torch.int8))
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
before = status("VmRSS:")
limit = status("VmSize:") + headroom
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
limits = {"device_map": "auto", "max_memory": {"cpu": allowed}} if allowed else {}
try:
    model = int8cli.load_model(directory, device="cpu", **limits)
    with torch.no_grad():
        logits = model(ids).logits
    print(json.dumps({"sum": float(logits.double().sum()), "grown": status("VmHWM:") - before}))
except (RuntimeError, MemoryError, int8cli.Int8cliError) as error:
    print(json.dumps({"error": type(error).__name__}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 32 blocks with 10 MB of int8 weights each, as convert would have written it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        max_position_embeddings=64,
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            tensors[name] = torch.randint(-127, 128, parameter.shape, dtype=torch.int8, generator=generator)
            tensors[f"{name.removesuffix('weight')}SCB"] = torch.full((parameter.shape[0],), 0.05)
        else:
            tensors[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def under_a_limit(directory: Path, allowed: int, headroom: int) -> dict[str, Any]:
    arguments = [sys.executable, "-c", UNDER_A_LIMIT, str(directory), str(allowed), str(headroom)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:  # a library that is refused memory may end the process
        return {"error": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_model_runs_in_less_address_space_and_memory_than_its_weights_take(large: Path) -> None:
    weights = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    headroom = 300_000_000  # for 60 MB of weights and what transformers' loading takes
    assert weights > headroom
    assert under_a_limit(large, 0, headroom).get("error")
    found = under_a_limit(large, 60_000_000, headroom)
    assert found["grown"] < 0.6 * weights
    whole = under_a_limit(large, 0, 16 << 30)
    assert found["sum"] == whole["sum"]
    assert whole["grown"] > weights
