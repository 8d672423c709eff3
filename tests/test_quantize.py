"""The arithmetic on the values of a weight, compared with bitsandbytes and float64."""

import math

import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes
import pytest
import torch
from torch import Tensor

from int8cli.llm_int8.metrics import ErrorSums
from int8cli.llm_int8.quantize import BlockQuantizer, NonFiniteWeightError, quantize_rowwise

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def random_weight(rows: int, columns: int, scale: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)


def by_bitsandbytes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What `Int8Params` stores: a cast to float16, then the library's own kernel."""
    data, row_absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(weight.half().contiguous(), 0.0)
    return data, row_absmax


def error_sums(weight: Tensor) -> ErrorSums:
    quantizer = BlockQuantizer(weight.numel())
    data = torch.empty(weight.shape, dtype=torch.int8)
    absmax = torch.empty(weight.shape[0])
    return quantizer.quantize_and_measure(weight, quantizer.row_absmax(weight), data=data, stored_absmax=absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-9, 1e-7, 1e-6, 1e-4, 1e-3, 4e-3, 0.02, 1.0, 300.0])
def test_agrees_with_bitsandbytes_bit_for_bit(dtype: torch.dtype, scale: float) -> None:
    weight = random_weight(129, 517, scale, dtype)
    weight[5] = 0
    data, absmax = quantize_rowwise(weight, float32_via_half=True)
    expected_data, expected_absmax = by_bitsandbytes(weight)
    assert torch.equal(data, expected_data)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_magnitude_agree_with_bitsandbytes_in_one_weight(dtype: torch.dtype) -> None:
    scales = torch.logspace(-8, 4, 97)[:, None]
    weight = (random_weight(97, 301, 1.0, torch.float32) * scales).to(dtype)
    data, absmax = quantize_rowwise(weight, float32_via_half=True)
    expected_data, expected_absmax = by_bitsandbytes(weight)
    assert torch.equal(data, expected_data)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 5), (64, 63)])
def test_odd_and_tiny_shapes_agree_with_bitsandbytes(shape: tuple[int, int]) -> None:
    weight = random_weight(*shape, 0.05, torch.bfloat16)
    data, absmax = quantize_rowwise(weight)
    expected_data, expected_absmax = by_bitsandbytes(weight)
    assert torch.equal(data, expected_data)
    assert torch.equal(absmax, expected_absmax)


def test_every_bfloat16_value_agrees_with_bitsandbytes() -> None:
    """All finite bfloat16 values up to float16's largest, each in a row whose absmax is one of many."""
    every = torch.arange(0, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    every = every[every <= 65504]
    for absmax in (65280.0, 3.0, 0.25, 0.0156, 0.0154, 1e-3, 6e-5, 1e-6):
        values = every[every <= absmax]
        row = torch.cat([values, -values, torch.tensor([absmax], dtype=torch.bfloat16)])[None]
        assert torch.equal(quantize_rowwise(row)[0], by_bitsandbytes(row)[0]), absmax


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_stay_zero_with_scale_zero(dtype: torch.dtype) -> None:
    data, absmax = quantize_rowwise(torch.zeros(3, 4, dtype=dtype))
    assert not data.any()
    assert not absmax.any()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-37, 1e-39, 1e-42, 1e-45])
def test_the_smallest_float32_rows_keep_their_values(magnitude: float) -> None:
    weight = torch.tensor([[1.0, -0.5, 0.0, 0.25]], dtype=torch.float64).mul(magnitude).float()
    data, absmax = quantize_rowwise(weight)
    assert absmax[0] == weight.abs().max()
    exact = weight.double() * 127 / weight.abs().max().double()
    assert torch.equal(data.double(), exact.round())


def test_bfloat16_beyond_float16_is_quantized_as_it_is() -> None:
    weight = torch.tensor([[1e6, -2e6, 0.0]], dtype=torch.bfloat16)
    data, absmax = quantize_rowwise(weight)
    assert absmax[0] == weight.float().abs().max()
    assert data.tolist() == [[64, -127, 0]] or data.tolist() == [[63, -127, 0]]


def test_float32_direct_keeps_the_exact_absmax() -> None:
    weight = random_weight(33, 65, 0.02, torch.float32)
    _, absmax = quantize_rowwise(weight)
    assert torch.equal(absmax, weight.abs().amax(dim=1))
    _, through_half = quantize_rowwise(weight, float32_via_half=True)
    assert not torch.equal(through_half, absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_is_reported_with_its_position(dtype: torch.dtype, bad: float) -> None:
    weight = random_weight(8, 9, 1.0, dtype)
    weight[6, 7] = bad
    with pytest.raises(NonFiniteWeightError) as caught:
        quantize_rowwise(weight)
    assert (caught.value.row, caught.value.column) == (6, 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.02, 5.0])
def test_error_sums_are_those_of_the_dequantized_weight(dtype: torch.dtype, scale: float) -> None:
    weight = random_weight(40, 333, scale, dtype)
    sums = error_sums(weight)
    data, absmax = quantize_rowwise(weight)
    exact = weight.double()
    error = exact - data.double() * absmax.double()[:, None] / 127
    assert sums.numel == weight.numel()
    assert sums.sum_squared_error == pytest.approx(float(error.square().sum()), rel=1e-5)
    assert sums.sum_squared_weight == pytest.approx(float(exact.square().sum()), rel=1e-5)
    assert sums.max_abs_error == pytest.approx(float(error.abs().max()), rel=1e-4)
    assert sums.sum_abs_data == float(data.double().abs().sum())
    assert sums.row_absmax_min == float(absmax.min())
    assert sums.row_absmax_max == float(absmax.max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_error_is_exact_although_computed_from_squares(dtype: torch.dtype) -> None:
    weight = random_weight(40, 333, 0.02, dtype)
    data, absmax = quantize_rowwise(weight)
    scaled = weight.float() * (absmax.reciprocal() * 127)[:, None]
    by_row = (scaled - data.float()).abs().amax(dim=1).double() * (absmax.double() / 127)
    assert error_sums(weight).max_abs_error == float(by_row.max())


def test_a_row_that_underflows_in_float16_counts_as_error() -> None:
    weight = torch.full((2, 4), 1e-9, dtype=torch.bfloat16)
    weight[1] = 1.0
    sums = error_sums(weight)
    assert sums.max_abs_error == pytest.approx(float(weight[0, 0]))
    assert sums.sum_squared_error == pytest.approx(4 * float(weight[0, 0]) ** 2, rel=1e-6)


def test_sums_of_parts_make_the_sums_of_the_whole() -> None:
    weight = random_weight(64, 100, 0.1, torch.bfloat16)
    whole = error_sums(weight)
    parts = error_sums(weight[:10]) + error_sums(weight[10:])
    assert parts.sum_squared_error == pytest.approx(whole.sum_squared_error, rel=1e-12)
    assert parts.max_abs_error == whole.max_abs_error
    assert parts.sum_abs_data == whole.sum_abs_data


@pytest.mark.parametrize("float32_via_half", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_measuring_does_not_change_the_statistics(dtype: torch.dtype, float32_via_half: bool) -> None:
    scales = torch.logspace(-40, 4, 97)[:, None]
    weight = (random_weight(97, 301, 1.0, torch.float32) * scales).to(dtype)
    quantizer = BlockQuantizer(weight.numel(), float32_via_half=float32_via_half)
    outcomes = []
    for quantize in (quantizer.quantize, quantizer.quantize_and_measure):
        data, absmax = torch.empty(weight.shape, dtype=torch.int8), torch.empty(97)
        quantize(weight, quantizer.row_absmax(weight), data=data, stored_absmax=absmax)
        outcomes.append((data, absmax))
    (plain, plain_absmax), (measured, measured_absmax) = outcomes
    assert torch.equal(plain, measured)
    assert torch.equal(plain_absmax, measured_absmax)


def test_a_weight_of_zeros_has_no_error_and_no_ratio() -> None:
    sums = error_sums(torch.zeros(4, 4))
    assert sums.relative_frobenius_error == 0.0
    assert sums.sqnr_db is None
    assert sums.mean_range_use == 0.0


def test_columns_of_a_row_can_be_quantized_apart_with_the_row_absmax() -> None:
    weight = random_weight(3, 1000, 0.3, torch.float16)
    quantizer = BlockQuantizer(weight.numel())
    absmax = quantizer.row_absmax(weight)
    pieces = []
    for columns in weight.split(300, dim=1):
        data, stored = torch.empty(columns.shape, dtype=torch.int8), torch.empty(3)
        quantizer.quantize(columns.contiguous(), absmax, data=data, stored_absmax=stored)
        pieces.append(data)
    assert torch.equal(torch.cat(pieces, dim=1), quantize_rowwise(weight)[0])
