"""The LLM.int8() product, compared with the same definitions in float64 and Python integers."""

import pytest
import torch
from torch import Tensor

from int8cli.llm_int8 import cpu_product
from int8cli.llm_int8.cpu_product import WAYS, Way
from int8cli.llm_int8.matmul import (
    InputScheme,
    Int8Weight,
    input_gradient,
    int8_product,
    llm_int8_linear,
    quantize_tokens,
    vectorwise_linear,
)
from int8cli.llm_int8.quantize import quantize_rowwise

SCHEMES: tuple[InputScheme, ...] = ("absmax", "zeropoint")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_columns(weight: Tensor, columns: list[int]) -> Int8Weight:
    return Int8Weight.of(*quantize_rowwise(weight), torch.tensor(columns), weight[:, columns])


def relative_error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (17, 1500, 33), (40, 4097, 9)])
def test_integer_products_are_exact(shape: tuple[int, int, int]) -> None:
    tokens, features, outputs = shape
    generator = torch.Generator().manual_seed(1)
    left = torch.randint(-128, 128, (tokens, features), dtype=torch.int8, generator=generator)
    right = torch.randint(-127, 128, (outputs, features), dtype=torch.int8, generator=generator)
    assert torch.equal(int8_product(left, right).long(), left.long() @ right.long().t())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 3, 1), (2, 576, 33), (5, 64, 1), (8, 1500, 130), (32, 4097, 9)])
def test_every_way_of_the_product_gives_the_same_integers(way: Way, shape: tuple[int, int, int]) -> None:
    tokens, features, outputs = shape
    generator = torch.Generator().manual_seed(1)
    left = torch.randint(-128, 128, (tokens, features), dtype=torch.int8, generator=generator)
    right = torch.randint(-127, 128, (outputs, features), dtype=torch.int8, generator=generator)
    found = way(left, right)
    assert torch.equal(found.long(), left.long() @ right.long().t())
    assert found.is_contiguous()  # or what a layer gives would have other strides, by the clock


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 17, 40])
@pytest.mark.parametrize("outputs", [1, 2, 3, 33, 130])
@pytest.mark.parametrize("features", [2, 31, 64, 1024, 2048])
def test_rows_with_gaps_give_the_same_integers(tokens: int, outputs: int, features: int) -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.randint(-128, 128, (tokens, features), dtype=torch.int8, generator=generator)
    right = torch.randint(-127, 128, (outputs, features + 64), dtype=torch.int8, generator=generator)[:, :features]
    expected = left.long() @ right.long().t()
    assert torch.equal(int8_product(left, right).long(), expected)
    if outputs > 1:
        for way in WAYS:
            assert torch.equal(way(left, right).long(), expected)


def test_a_weight_whose_rows_would_alias_is_laid_out_with_gaps() -> None:
    for width, gap in ((1024, 64), (4096, 64), (1000, 0), (576, 0)):
        data = torch.randint(-127, 128, (3, width), dtype=torch.int8)
        laid = cpu_product.laid_out(data)
        assert torch.equal(laid, data)
        assert laid.stride() == (width + gap, 1)


def test_for_few_tokens_the_way_that_was_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {WAYS[0]: 3.0, WAYS[1]: 1.0, WAYS[2]: 2.0}
    timed: list[Way] = []

    def timing(way: Way, left: Tensor, right: Tensor) -> float:
        timed.append(way)
        return seconds[way]

    monkeypatch.setattr(cpu_product, "_seconds", timing)
    monkeypatch.setattr(cpu_product, "_chosen", {})
    left, right = torch.ones(4, 40, dtype=torch.int8), torch.ones(7, 40, dtype=torch.int8)
    for _ in range(2):
        assert cpu_product.cpu_product(left, right).tolist() == [[40] * 7] * 4
    assert timed == list(WAYS)
    assert list(cpu_product._chosen.values()) == [WAYS[1]]
    cpu_product.cpu_product(left[:1], right)
    cpu_product.cpu_product(left.repeat(20, 1), right)
    assert timed == list(WAYS)  # neither one token nor many are timed


def test_a_sum_beyond_int32_is_exact_too() -> None:
    features = 150_000
    left = torch.full((2, features), -128, dtype=torch.int8)
    right = torch.full((3, features), 127, dtype=torch.int8)
    assert int8_product(left, right).tolist() == [[-128 * 127 * features] * 3] * 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_product_is_that_of_the_dequantized_matrices(scheme: InputScheme) -> None:
    inputs, weight = random(19, 300), random(31, 300, seed=1)
    data, row_absmax = quantize_rowwise(weight)
    quantized = quantize_tokens(inputs, scheme)
    dequantized = (quantized.data.double() - quantized.zero_point.double()[:, None]) * quantized.step.double()[:, None]
    expected = dequantized @ (data.double() * row_absmax.double()[:, None] / 127).t()
    result = vectorwise_linear(quantized, Int8Weight.of(data, row_absmax))
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", [1, 1000, 1 << 22])
def test_the_gradient_is_that_through_the_weight_in_floats(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("int8cli.llm_int8.matmul._BLOCK_ELEMENTS", block)
    weight, gradient = random(31, 50), random(4, 31, seed=1)
    stored = with_columns(weight, [3, 40])
    floats = stored.data.float() * stored.step[:, None]
    floats[:, [3, 40]] = weight[:, [3, 40]]
    torch.testing.assert_close(input_gradient(gradient, stored), gradient @ floats)


def test_absmax_maps_the_largest_magnitude_to_127() -> None:
    quantized = quantize_tokens(torch.tensor([[1.0, -4.0, 2.0], [0.0, 0.0, 0.0]]), "absmax")
    assert quantized.data.tolist() == [[32, -127, 64], [0, 0, 0]]
    assert quantized.step.tolist() == [pytest.approx(4 / 127), 0.0]
    assert not quantized.zero_point.any()


def test_zeropoint_uses_the_whole_range_of_one_sided_inputs() -> None:
    quantized = quantize_tokens(torch.tensor([[0.0, 1.0, 255.0], [0.0, 0.0, 0.0], [-2.0, -1.0, -4.0]]), "zeropoint")
    assert quantized.data[0].tolist() == [-128, -127, 127]
    assert torch.equal(quantized.data[1].float(), quantized.zero_point[1].expand(3))  # (data - zero_point) is 0
    assert quantized.data[2].min() == -128
    # Zero is always a whole number of steps, so that a column that was removed adds nothing.
    assert torch.equal(quantized.zero_point, quantized.zero_point.round())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outlier_columns_are_exact_and_do_not_enlarge_scales(scheme: InputScheme, dtype: torch.dtype) -> None:
    inputs, weight = random(16, 128).to(dtype), random(24, 128, seed=2).to(dtype)
    inputs[:, [7, 90]] *= 200
    exact = inputs.double() @ weight.double().t()
    without = llm_int8_linear(inputs, Int8Weight.of(*quantize_rowwise(weight)), scheme)
    with_them = llm_int8_linear(inputs, with_columns(weight, [7, 90]), scheme)
    assert relative_error(with_them, exact) < 1e-3
    assert relative_error(without, exact) > 10 * relative_error(with_them, exact)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_with_all_columns_exact_the_product_is_that_of_float(scheme: InputScheme) -> None:
    inputs, weight = random(5, 12), random(7, 12, seed=3)
    result = llm_int8_linear(inputs, with_columns(weight, list(range(12))), scheme)
    torch.testing.assert_close(result, inputs @ weight.t(), rtol=1e-5, atol=1e-5)


def test_zeropoint_is_closer_for_one_sided_inputs() -> None:
    inputs, weight = random(64, 256).abs(), random(32, 256, seed=4)
    exact = inputs.double() @ weight.double().t()
    kept = Int8Weight.of(weight.mul(0).to(torch.int8), torch.zeros(32))
    assert not vectorwise_linear(quantize_tokens(inputs, "zeropoint"), kept).any()
    quantized = Int8Weight.of(*quantize_rowwise(weight))
    by_absmax = relative_error(llm_int8_linear(inputs, quantized, "absmax"), exact)
    by_zeropoint = relative_error(llm_int8_linear(inputs, quantized, "zeropoint"), exact)
    assert by_zeropoint < by_absmax
