"""Exponents of exact smoothing: their choice, and the promise that scaling by them loses nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from int8cli.llm_int8.limits import MAX_EXPONENT
from int8cli.llm_int8.quantize import quantize_rowwise
from int8cli.llm_int8.scales import powers_of_two
from int8cli.llm_int8.smoothing import (
    ALPHAS,
    ExponentRange,
    column_absmax,
    exact_range,
    input_range,
    smoothed_output_error,
    smoothing_exponents,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def some(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(shape[-1], generator=generator) * spread)
    return torch.randn(shape, generator=generator) * sizes


def every_float(dtype: torch.dtype) -> Tensor:
    """All finite values of a 16-bit dtype."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[torch.isfinite(values)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_value_is_exact_in_its_range_and_nowhere_else(dtype: torch.dtype) -> None:
    values = every_float(dtype)
    allowed = exact_range(values[None])
    for k in range(-MAX_EXPONENT, MAX_EXPONENT + 1):
        true = values.double() * 2.0**k
        exact = (values.double() * 2.0**k).to(dtype).double() == true
        said = (allowed.lowest <= k) & (k <= allowed.highest)
        assert torch.equal(said | (values == 0), exact), k


@given(st.integers(0, 10_000), st.sampled_from(DTYPES), st.sampled_from(ALPHAS), st.floats(0.0, 12.0))
def test_scaling_there_and_back_gives_the_same_bits(seed: int, dtype: torch.dtype, alpha: float, spread: float) -> None:
    weight = some((7, 9), seed, spread).to(dtype)
    weight = torch.where(torch.isfinite(weight), weight, 0)
    inputs = some((9,), seed + 1, spread).abs()
    allowed = exact_range(weight) & input_range(inputs, dtype)
    exponents = smoothing_exponents(inputs, column_absmax([weight]), alpha, allowed)
    scaled = weight * powers_of_two(exponents, dtype)
    assert bool(torch.isfinite(scaled).all())
    assert torch.equal(scaled * powers_of_two(-exponents, dtype), weight)
    assert torch.equal(scaled.double(), weight.double() * torch.exp2(exponents.double())[None])


@given(st.integers(0, 10_000), st.sampled_from(ALPHAS))
def test_exponents_are_those_of_smoothquant_rounded(seed: int, alpha: float) -> None:
    inputs, weights = some((24,), seed, 2.0).abs(), some((24,), seed + 1, 2.0).abs()
    found = smoothing_exponents(inputs, weights, alpha, ExponentRange.unlimited(24, inputs.device))
    scales = inputs.double() ** alpha / weights.double() ** (1 - alpha)
    scales /= scales.log2().mean().exp2()
    wanted = scales.log2()
    near = (found.double() - wanted).abs()
    assert bool((near[wanted.abs() <= MAX_EXPONENT] <= 0.5 + 1e-9).all())


def test_columns_of_zeros_are_left_alone() -> None:
    inputs, weights = torch.tensor([0.0, 1.0, 8.0]), torch.tensor([1.0, 0.0, 1.0])
    found = smoothing_exponents(inputs, weights, 0.5, ExponentRange.unlimited(3, inputs.device))
    assert found.tolist() == [0, 0, 0]
    nothing = torch.zeros(3)
    assert smoothing_exponents(nothing, nothing, 0.5, ExponentRange.unlimited(3, inputs.device)).tolist() == [0, 0, 0]


def test_columns_of_a_group_share_an_exponent() -> None:
    inputs, weights = torch.tensor([64.0, 1.0, 1.0, 1.0]), torch.ones(4)
    group = torch.tensor([0, 1, 0, 1])
    limits = ExponentRange(torch.tensor([-9, -9, -9, -9]), torch.tensor([9, 9, 1, 9]))
    found = smoothing_exponents(inputs, weights, 0.5, limits, group)
    assert found[0] == found[2] == 1  # 2^(3 - 1.5) is nearer to 4, which the third column does not allow
    assert found[1] == found[3]


def test_rows_scaled_by_powers_of_two_have_the_same_data() -> None:
    weight = some((16, 32), 3).bfloat16()
    exponents = torch.arange(-8, 8, dtype=torch.int8)
    data, absmax = quantize_rowwise(weight)
    scaled, scaled_absmax = quantize_rowwise(weight * powers_of_two(exponents, torch.bfloat16)[:, None])
    assert torch.equal(scaled_absmax, absmax * powers_of_two(exponents, torch.float32))
    assert torch.equal(scaled[absmax > 4], data[absmax > 4])


def test_smoothing_saves_a_layer_with_an_outlier_column() -> None:
    inputs, weight = some((64, 32), 5, 0.1), some((16, 32), 6, 0.1)
    inputs[:, 3] *= 300
    weight[:, 3] /= 300
    absmax = inputs.abs().amax(dim=0)
    allowed = exact_range(weight) & input_range(absmax, weight.dtype)
    exponents = smoothing_exponents(absmax, column_absmax([weight]), 0.5, allowed)
    plain = smoothed_output_error(inputs, weight, torch.zeros_like(exponents), "absmax")
    assert smoothed_output_error(inputs, weight, exponents, "absmax") < plain / 100
