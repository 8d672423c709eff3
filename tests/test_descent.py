"""The descent of a smoothing's exponents: the error that it expects, and that it keeps what it is told."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from int8cli.llm_int8.descent import descended
from int8cli.llm_int8.expected_error import STORED_COUNTS, ExpectedError
from int8cli.llm_int8.matmul import InputScheme, Int8Weight, llm_int8_linear
from int8cli.llm_int8.quantize import quantize_rowwise
from int8cli.llm_int8.smoothing import ExponentRange, smoothed_output_error, token_shares
from int8cli.outliers.sampled_rows import SampledRows

SCHEMES: tuple[InputScheme | None, ...] = ("absmax", "zeropoint", None)
TOKENS, COLUMNS, ROWS = 200, 48, 40


def uneven(shape: tuple[int, int], seed: int, spread: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(shape[1], generator=generator) * spread)
    return torch.randn(shape, generator=generator) * sizes


def unlimited(columns: int = COLUMNS) -> ExponentRange:
    return ExponentRange.unlimited(columns, torch.device("cpu"))


def measured(inputs: Tensor, weights: Sequence[Tensor], exponents: Tensor, scheme: InputScheme | None) -> float:
    return sum(smoothed_output_error(inputs, weight, exponents, scheme) for weight in weights)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_the_expected_error_is_about_what_is_measured(scheme: InputScheme | None, seed: int) -> None:
    inputs = uneven((TOKENS, COLUMNS), seed, 0.5)
    weights = [uneven((ROWS, COLUMNS), seed + 10 + place, 0.5) for place in (0, 1)]
    exponents = torch.randint(-2, 3, (COLUMNS,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    expected = ExpectedError(inputs, weights, scheme, weights_count=1.0)
    for some in (torch.zeros_like(exponents), exponents):
        assert expected.of(some) == pytest.approx(measured(inputs, weights, some, scheme), rel=0.15)


def with_columns_stored(inputs: Tensor, weight: Tensor, scales: Tensor, stored: Tensor, scheme: InputScheme) -> Tensor:
    """The int8 product of smoothed inputs and weight in which some columns are exact, (tokens, out_features)."""
    divided, scaled = inputs / scales, weight * scales
    others = divided.index_fill(1, stored, 0.0)
    exact = divided[:, stored] @ scaled[:, stored].t()
    return llm_int8_linear(others, Int8Weight.of(*quantize_rowwise(scaled)), scheme) + exact


@pytest.mark.parametrize("scheme", ["absmax", "zeropoint"])
@pytest.mark.parametrize("seed", range(3))
def test_stored_columns_have_a_share_in_the_expected_error(scheme: InputScheme, seed: int) -> None:
    inputs, weight = uneven((TOKENS, COLUMNS), seed, 0.5), uneven((ROWS, COLUMNS), seed + 10, 0.5)
    exponents = torch.randint(-2, 3, (COLUMNS,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    stored = torch.tensor([3, 40, 17])
    inputs[:, stored] *= 20.0
    product = with_columns_stored(inputs, weight, torch.exp2(exponents.float()), stored, scheme)
    errors = (product - inputs @ weight.t()).square().sum(dim=1)
    counted = float((token_shares((inputs @ weight.t()).square().sum(dim=1).double()) * errors).sum())
    alone = ExpectedError(inputs, [weight], scheme, weights_count=1.0)
    both = alone.with_stored(stored)
    found = (both.of(exponents) - (1.0 - STORED_COUNTS) * alone.of(exponents)) / STORED_COUNTS
    assert found == pytest.approx(counted, rel=0.2)
    assert found < alone.of(exponents) / 2.0


def test_stored_columns_leave_the_ranges_to_the_others() -> None:
    """Where columns are stored, the descent makes the product with them better than without that knowledge."""
    inputs, weight = uneven((TOKENS, COLUMNS), 20), uneven((ROWS, COLUMNS), 21)
    stored, nothing = inputs.square().mean(dim=0).topk(6).indices, torch.zeros(COLUMNS, dtype=torch.int8)
    alone = ExpectedError(inputs, [weight], "zeropoint")
    found = [descended(each, nothing, unlimited()) for each in (alone, alone.with_stored(stored))]
    products = [with_columns_stored(inputs, weight, torch.exp2(each.float()), stored, "zeropoint") for each in found]
    before, after = (float((product - inputs @ weight.t()).square().sum()) for product in products)
    assert after < before
    assert alone.of(found[0]) < alone.of(found[1]) < alone.of(nothing)


def test_the_error_of_weights_can_count_more() -> None:
    """Then the scales leave more of the error to the inputs."""
    inputs, weight = uneven((TOKENS, COLUMNS), 22), uneven((ROWS, COLUMNS), 23)
    nothing = torch.zeros(COLUMNS, dtype=torch.int8)
    found = [
        descended(ExpectedError(inputs, [weight], "zeropoint", weights_count=count), nothing, unlimited())
        for count in (1.0, 8.0)
    ]
    little, much = (measured(inputs, [weight], exponents, None) for exponents in found)
    assert much < little


@pytest.mark.parametrize("stored", [[], [0, 30, 7]])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_step_of_a_descent_is_what_it_would_be_from_the_start(
    scheme: InputScheme | None, stored: list[int]
) -> None:
    """Sums and maxima are updated step by step; the end must be as if it had been the beginning."""
    inputs, weights = uneven((TOKENS, COLUMNS), 1), [uneven((ROWS, COLUMNS), place) for place in (2, 3)]
    expected, nothing = ExpectedError(inputs, weights, scheme), torch.zeros(COLUMNS, dtype=torch.int8)
    if stored:
        expected = expected.with_stored(torch.tensor(stored))
    found, before = descended(expected, nothing, unlimited()), nothing
    while not torch.equal(found, before):
        found, before = descended(expected, found, unlimited()), found
    assert found.dtype == torch.int8
    assert expected.of(found) < expected.of(nothing)
    assert measured(inputs, weights, found, scheme) < measured(inputs, weights, nothing, scheme)
    for column in range(0, COLUMNS, 5):
        for step in (-1, 1):
            moved = found.clone()
            moved[column] += step
            assert expected.of(moved) >= expected.of(found) * (1.0 - 1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_descent_stays_within_what_is_allowed(scheme: InputScheme | None) -> None:
    inputs, weights = uneven((TOKENS, COLUMNS), 4), [uneven((ROWS, COLUMNS), 5)]
    nothing = torch.zeros(COLUMNS, dtype=torch.int8)
    free = descended(ExpectedError(inputs, weights, scheme), nothing, unlimited())
    limits = ExponentRange(torch.full((COLUMNS,), -1), torch.full((COLUMNS,), 1))
    limits.lowest[7] = limits.highest[7] = 0
    found = descended(ExpectedError(inputs, weights, scheme), nothing, limits)
    assert int(free.abs().max()) > 1
    assert int(found.abs().max()) == 1
    assert found[7] == 0


@pytest.mark.parametrize("stored", [False, True])
def test_columns_of_a_group_move_together(stored: bool) -> None:
    inputs, weights = uneven((TOKENS, COLUMNS), 6), [uneven((ROWS, COLUMNS), 7)]
    group = torch.arange(COLUMNS) % 16 + 5  # any numbers
    limits = unlimited()
    limits.highest[3] = 0  # and with it 19 and 35
    expected, alone = (ExpectedError(inputs, weights, "zeropoint", each) for each in (group, None))
    if stored:
        expected, alone = (each.with_stored(torch.tensor([3, 5])) for each in (expected, alone))
    found = descended(expected, torch.zeros(COLUMNS, dtype=torch.int8), limits)
    assert all(len(set(found[group == number].tolist())) == 1 for number in group.unique())
    assert int(found[19]) <= 0
    assert expected.of(found) == pytest.approx(alone.of(found), rel=1e-6)
    assert alone.of(found) < alone.of(torch.zeros_like(found))


def test_neither_the_dtype_nor_the_order_of_memory_matters() -> None:
    """But for the rounding of sums, which may decide between two steps that are equally good."""
    inputs, weight = uneven((TOKENS, COLUMNS), 8).bfloat16(), uneven((ROWS, COLUMNS), 9).bfloat16()
    nothing = torch.zeros(COLUMNS, dtype=torch.int8)
    one = ExpectedError(inputs, [weight], "zeropoint")
    other = ExpectedError(inputs.float(), [weight.float().t().contiguous().t()], "zeropoint")
    assert other.of(nothing) == pytest.approx(one.of(nothing), rel=1e-5)
    found = one.of(descended(one, nothing, unlimited()))
    assert one.of(descended(other, nothing, unlimited())) == pytest.approx(found, rel=0.02)


def squared_errors(inputs: Tensor, weight: Tensor, exponents: Tensor) -> Tensor:
    """||error_t||² of the int8 product with zero points: float32 (tokens,)."""
    scales = torch.exp2(exponents.float())
    product = llm_int8_linear(inputs / scales, Int8Weight.of(*quantize_rowwise(weight * scales)), "zeropoint")
    return (product - inputs @ weight.t()).square().sum(dim=1)


def test_a_token_with_a_massive_activation_counts_as_much_as_all_others() -> None:
    """It is neither one of many, nor all that counts."""
    energies = torch.tensor([1e6, 1.0, 4.0, 0.0], dtype=torch.float64)
    shares = token_shares(energies)
    assert torch.allclose(shares * energies, torch.tensor([0.625, 0.125, 0.125, 0.0], dtype=torch.float64), atol=1e-5)
    assert torch.equal(token_shares(torch.zeros(3, dtype=torch.float64)), torch.zeros(3, dtype=torch.float64))


def test_a_token_with_a_massive_activation_decides_how_its_column_is_scaled() -> None:
    inputs, weight = uneven((TOKENS, COLUMNS), 10, 0.3), uneven((ROWS, COLUMNS), 11, 0.3)
    nothing = torch.zeros(COLUMNS, dtype=torch.int8)
    usual = descended(ExpectedError(inputs, [weight], "zeropoint", weights_count=1.0), nothing, unlimited())
    inputs[0, 7] = 3000.0
    expected = ExpectedError(inputs, [weight], "zeropoint", weights_count=1.0)
    found = descended(expected, usual, unlimited())
    before, after = (squared_errors(inputs, weight, exponents) for exponents in (usual, found))
    assert after[0] < before[0] * 0.9
    assert expected.of(found) < expected.of(usual)


@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_tokens_count_in_the_descent_as_in_the_measured_error(factor: float) -> None:
    inputs, weight = uneven((TOKENS, COLUMNS), 12, 0.5), uneven((ROWS, COLUMNS), 13, 0.5)
    inputs[5] *= factor
    nothing = torch.zeros(COLUMNS, dtype=torch.int8)
    expected = ExpectedError(inputs, [weight], "zeropoint", weights_count=1.0).of(nothing)
    assert expected == pytest.approx(smoothed_output_error(inputs, weight, nothing, "zeropoint"), rel=0.2)
    energies = (inputs @ weight.t()).square().sum(dim=1)
    counted = token_shares(energies.double()) * squared_errors(inputs, weight, nothing)
    assert smoothed_output_error(inputs, weight, nothing, "zeropoint") == pytest.approx(float(counted.sum()), rel=1e-4)


def test_zeros_are_no_obstacle() -> None:
    inputs, weight = uneven((TOKENS, COLUMNS), 12), uneven((ROWS, COLUMNS), 13)
    inputs[3] = 0.0  # a token
    inputs[:, 4], weight[:, 5], weight[6] = 0.0, 0.0, 0.0
    nothing = torch.zeros(COLUMNS, dtype=torch.int8)
    expected = ExpectedError(inputs, [weight], "zeropoint")
    found = descended(expected, nothing, unlimited())
    assert 0.0 < expected.of(found) < expected.of(nothing)
    silent = ExpectedError(torch.zeros_like(inputs), [weight], "zeropoint")
    assert silent.of(nothing) == 0.0
    assert torch.equal(descended(silent, nothing, unlimited()), nothing)
    single = ExpectedError(inputs[:, :1], [weight[:, :1]], "absmax")
    assert torch.equal(descended(single, nothing[:1], unlimited(1)), nothing[:1])


@pytest.mark.parametrize("calls", [[1000], [300, 300, 400], [1] * 40, [7, 0, 90]])
def test_samples_are_evenly_spaced_over_all_rows(calls: list[int]) -> None:
    total, most = sum(calls), 64
    rows = torch.arange(float(total))[:, None].repeat(1, 3)
    sampled = SampledRows(most)
    for part in rows.split(calls):
        sampled.add(part)
    kept = sampled.rows()[:, 0]
    stride = int(kept[1] - kept[0])
    assert torch.equal(kept, torch.arange(0.0, total, stride))
    assert min(total, most // 2) <= len(kept) <= most
