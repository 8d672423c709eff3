"""Packed weights: the same bits as products of the plain weight, in every form that a layer takes."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.program import environment
from torch import Tensor

from int8cli.errors import UnsupportedOperationError
from int8cli.llm_int8 import packed_weight
from int8cli.llm_int8.matmul import InputScheme, Int8Weight, input_gradient, llm_int8_linear
from int8cli.llm_int8.packed_weight import PackedWeight
from int8cli.runtime.guarded_int8 import PackedInt8
from int8cli.runtime.linear import Int8Linear
from int8cli.runtime.packing import pack_layers

pytestmark = pytest.mark.skipif(not packed_weight.is_supported(), reason="torch has no exact packed product here")

SHAPES = [(1, 1, 1), (3, 5, 7), (0, 4, 3), (2, 576, 33), (8, 1500, 130), (9, 6000, 40), (40, 4097, 9)]
KINDS = ("uniform", "normal", "largest")


def int8_of(kind: str, outputs: int, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "uniform":
        return torch.randint(-128, 128, (outputs, features), dtype=torch.int8, generator=generator)
    if kind == "normal":
        return (torch.randn(outputs, features, generator=generator) * 30).clamp(-127, 127).to(torch.int8)
    data = torch.full((outputs, features), 127, dtype=torch.int8)
    data[: outputs // 2] = -128
    return data


def packed_of(data: Tensor) -> PackedWeight:
    packed = PackedWeight.of(data)
    assert packed is not None
    return packed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_products_are_exact(shape: tuple[int, int, int], kind: str) -> None:
    tokens, features, outputs = shape
    data, values = int8_of(kind, outputs, features), int8_of(kind, tokens, features)
    packed = packed_of(data)
    product = packed.product(values.float())
    assert torch.equal(product.long(), values.long() @ data.long().t())
    assert product.dtype == (torch.float32 if packed.in_one_part else torch.int32)
    assert torch.equal(packed.unpacked(), data)


UNDER_A_LIMIT = """
import resource, sys
import torch
from int8cli.llm_int8.packed_weight import PackedWeight
from int8cli.model.memory import available_bytes

torch.set_num_threads(1)
data = torch.ones(8192, 4096, dtype=torch.int8)
assert PackedWeight.of(data[:64]) is not None
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for copies in (1.5, 0.5, 4.0):
    limit = taken + int(copies * data.numel())
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    assert available_bytes("cpu") < copies * data.numel() + (1 << 22)
    print(copies, PackedWeight.of(data) is not None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep to RLIMIT_AS")
def test_a_weight_is_not_packed_where_the_system_has_no_memory_for_that() -> None:
    """FBGEMM does not look whether it got the memory that it asked for: the process would crash."""
    done = subprocess.run([sys.executable, "-c", UNDER_A_LIMIT], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1.5 False\n0.5 False\n4.0 True\n"), done.stderr


def test_a_weight_is_cut_where_float32_could_not_hold_its_sums() -> None:
    assert packed_of(int8_of("largest", 4, 1024)).in_one_part
    assert not packed_of(int8_of("largest", 4, 1025)).in_one_part
    assert packed_of(int8_of("normal", 4, 2048)).in_one_part


@pytest.mark.parametrize("scheme", ["absmax", "zeropoint"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_gives_the_same_bits_with_a_packed_weight(
    shape: tuple[int, int, int], kind: str, scheme: InputScheme
) -> None:
    tokens, features, outputs = shape
    generator = torch.Generator().manual_seed(2)
    data, row_absmax = int8_of(kind, outputs, features), torch.rand(outputs, generator=generator)
    columns = torch.tensor(sorted({0, features // 2}))
    stored = torch.randn(outputs, len(columns), generator=generator)
    rows = 3 * torch.randn(tokens, features, generator=generator) + 1
    rows[: tokens // 2] = rows[: tokens // 2].abs() + 100  # zero points at the end of the range
    packed = packed_of(data)
    for sidecar in ((columns, stored), (None, None)):
        plain = llm_int8_linear(rows, Int8Weight.of(data, row_absmax, *sidecar), scheme)
        assert torch.equal(
            llm_int8_linear(rows, Int8Weight.of(data, row_absmax, *sidecar, packed=packed), scheme), plain
        )


@pytest.mark.parametrize("scheme", ["absmax", "zeropoint"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_token_with_a_value_that_is_not_finite_gives_nan_whatever_the_weight_is(
    value: float, scheme: InputScheme
) -> None:
    data, row_absmax = int8_of("normal", 5, 40), torch.ones(5)
    columns, stored = torch.tensor([7]), torch.ones(5, 1)
    rows = torch.randn(4, 40, generator=torch.Generator().manual_seed(4))
    expected = llm_int8_linear(rows, Int8Weight.of(data, row_absmax, columns, stored), scheme)
    rows[1, 30] = rows[2, 7] = value  # the second is in a stored column, which has no part in a token's scale
    for packed in (None, packed_of(data)):
        found = llm_int8_linear(rows, Int8Weight.of(data, row_absmax, columns, stored, packed=packed), scheme)
        assert found[1].isnan().all()
        assert torch.equal(found[[0, 3]], expected[[0, 3]])
        assert torch.equal(found[2].isnan(), torch.full((5,), value != value))
        assert not found[2].isfinite().any()


def test_values_beyond_int8_are_clamped_by_the_packed_product() -> None:
    data = int8_of("uniform", 6, 30)
    values = torch.tensor([128.0, -129.0, 127.0, -128.0, 200.0])[:, None].expand(5, 30).contiguous()
    expected = values.clamp(-128, 127).long() @ data.long().t()
    assert torch.equal(packed_of(data).product(values).long(), expected)


def test_threads_that_pack_at_once_leave_the_engine_as_it_was() -> None:
    before = torch.backends.quantized.engine
    weights = [int8_of("uniform", 64, 100 + number) for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        packed = list(pool.map(packed_of, weights))
    assert torch.backends.quantized.engine == before
    assert all(torch.equal(each.unpacked(), data) for each, data in zip(packed, weights, strict=True))


def test_the_gradient_is_that_of_the_plain_weight() -> None:
    data, row_absmax = int8_of("normal", 7, 12), torch.ones(7)
    gradient = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    found = input_gradient(gradient, Int8Weight.of(data, row_absmax, packed=packed_of(data)))
    assert torch.equal(found, input_gradient(gradient, Int8Weight.of(data, row_absmax)))


@pytest.fixture
def unknown() -> Iterator[None]:
    """As in a process that has not asked yet."""
    packed_weight.is_supported.cache_clear()
    yield
    packed_weight.is_supported.cache_clear()


def test_a_product_that_saturates_is_not_used(unknown: None, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = packed_weight._multiplied
    monkeypatch.setattr(packed_weight, "_multiplied", lambda values, part: exact(values, part).clamp(max=1e6))
    assert PackedWeight.of(int8_of("normal", 4, 8)) is None


def test_a_torch_without_the_engine_is_no_error(unknown: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weight, "_ENGINE", "none")
    assert PackedWeight.of(int8_of("normal", 4, 8)) is None


def test_packing_leaves_the_engine_as_it_was() -> None:
    before = torch.backends.quantized.engine
    packed_of(int8_of("normal", 4, 8))
    assert torch.backends.quantized.engine == before


# The layer


def layer_of(*, packing: bool = True) -> Int8Linear:
    layer = Int8Linear(40, 24, torch.nn.Parameter(torch.ones(24)), inputs="zeropoint", columns=2)
    layer._buffers["weight"] = int8_of("normal", 24, 40)
    layer.row_absmax.fill_(0.5)
    layer.outlier_cols.copy_(torch.tensor([3, 17]))
    layer.outlier_weight.fill_(0.25)
    layer.prepare(packing=packing)
    return layer


ROWS = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(3))


def test_a_layer_shows_its_packed_weight_as_an_int8_tensor() -> None:
    layer, data = layer_of(), int8_of("normal", 24, 40)
    assert isinstance(layer.weight, PackedInt8)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == (data.shape, torch.int8, data.device)
    assert torch.equal(layer.weight, data)
    assert torch.equal(layer.weight[3:5, ::2].float(), data[3:5, ::2].float())
    assert torch.equal(layer.state_dict()["weight"].clone(), data)
    assert layer.weight.tolist() == data.tolist()
    assert layer.weight.numpy().tobytes() == layer.weight.cpu().contiguous().numpy().tobytes() == data.numpy().tobytes()
    assert sum(each.nelement() * each.element_size() for each in [layer.weight]) == data.numel()
    assert torch.equal(layer.dequantize(), layer_of(packing=False).dequantize())


def test_copies_of_a_packed_tensor_are_plain_tensors() -> None:
    state = layer_of().state_dict()
    for copied in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert type(copied["weight"]) is torch.Tensor
        assert torch.equal(copied["weight"], int8_of("normal", 24, 40))


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.to("cpu"),
    ],
)
def test_copies_and_casts_stay_packed(copied: Any) -> None:
    expected = layer_of(packing=False)(ROWS)
    layer = copied(layer_of())
    assert layer.packed is not None
    assert torch.equal(layer(ROWS), expected)


def test_a_weight_is_unpacked_for_another_device() -> None:
    layer = layer_of().to("meta")
    assert layer.packed is None
    assert (layer.weight.device.type, layer.weight.shape, layer.row_sums.dtype) == ("meta", (24, 40), torch.int32)
    assert layer(ROWS.to("meta")).shape == (2, 3, 24)


def test_gradients_pass_through_a_packed_layer() -> None:
    found = []
    for packing in (True, False):
        rows = ROWS.clone().requires_grad_()
        layer_of(packing=packing)(rows).sum().backward()
        assert rows.grad is not None
        found.append(rows.grad)
    assert torch.equal(*found)


def test_a_packed_layer_compiles_as_one_graph() -> None:
    layer = layer_of()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ROWS), layer(ROWS), rtol=1e-6, atol=1e-6)


def test_a_cut_weight_compiles_too() -> None:
    packed = packed_of(int8_of("largest", 4, 1500))
    values = torch.full((3, 1500), -128.0)
    compiled = torch.compile(packed.product, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(values), packed.product(values))


@pytest.mark.parametrize("error", [NotImplementedError("removed"), RuntimeError("removed"), AttributeError("engine")])
def test_a_torch_that_does_not_pack_any_more_computes_with_the_plain_weight(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(data: Any) -> Any:
        raise error

    packed_weight.is_supported.cache_clear()
    monkeypatch.setattr(packed_weight, "_packed", fail)
    data = torch.ones(4, 8, dtype=torch.int8)
    assert packed_weight.PackedWeight.of(data) is None
    assert not packed_weight.is_supported()
    packed_weight.is_supported.cache_clear()
    monkeypatch.setattr(packed_weight, "is_supported", lambda: True)
    assert packed_weight.PackedWeight.of(data) is None


def test_a_packed_layer_computes_with_the_weight_that_is_loaded_into_it() -> None:
    layer, other = layer_of(), layer_of(packing=False)
    state = other.state_dict()
    state["weight"] = int8_of("uniform", 24, 40)
    other._buffers["weight"] = state["weight"]
    other.prepare(packing=False)
    layer.load_state_dict(state)
    assert layer.packed is not None
    assert torch.equal(layer(ROWS), other(ROWS))


@pytest.mark.parametrize("write", [lambda weight: weight.zero_(), lambda weight: weight.copy_(torch.ones(24, 40))])
def test_a_packed_weight_is_not_written_to(write: Any) -> None:
    layer = layer_of()
    with pytest.raises(UnsupportedOperationError):
        write(layer.weight)
    assert torch.equal(layer.weight, int8_of("normal", 24, 40))


def test_layers_are_packed_in_threads_and_torch_keeps_its_own() -> None:
    threads = torch.get_num_threads()
    layers = [layer_of(packing=False) for _ in range(9)]
    expected = layers[0](ROWS)
    pack_layers(layers)
    assert all(layer.packed is not None and torch.equal(layer(ROWS), expected) for layer in layers)
    assert torch.get_num_threads() == threads


def test_what_fails_in_a_thread_fails_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()

    def fail(layer: Int8Linear) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(Int8Linear, "prepare", fail)
    with pytest.raises(MemoryError, match="no room"):
        pack_layers([Int8Linear(4, 3, None, inputs="absmax")])
    assert torch.get_num_threads() == threads
