"""The scales of a smoothing: what an exponent stands for, and that scaling rounds once."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from int8cli.llm_int8.limits import EXACT_STEPS, FINE_STEPS, Steps
from int8cli.llm_int8.scales import QUARTERS, powers_of_two, scaled, scales
from int8cli.verification.nearest import is_nearest

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def some(dtype: torch.dtype, rows: int = 5, columns: int = 40) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).to(dtype)


def exponents(size: int, largest: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, (size,), generator=generator).to(torch.int8)


def scale_of(exponent: int) -> Fraction:
    """s(k) in quarter steps, by its definition."""
    return Fraction(2) ** (exponent // 4) * Fraction(QUARTERS[exponent % 4])


def nearest(exact: Fraction, near: float, dtype: torch.dtype) -> float:
    """The value of a dtype that is nearest to an exact one, found among the neighbours of `near`."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    found = torch.tensor(near).to(dtype).view(bits)
    beside = [(found + step).view(dtype) for step in (-2, -1, 0, 1, 2)]
    distance = {float(each): abs(Fraction(float(each)) - exact) for each in beside}
    first, second, *_ = sorted(distance, key=distance.__getitem__)
    assert distance[first] < distance[second]  # none is half-way
    return first


def test_scales_are_powers_of_two_and_close_to_quarters_between() -> None:
    numbers = torch.arange(-56, 57).to(torch.int8)
    fine = scales(numbers, FINE_STEPS)
    assert torch.equal(fine[::4], powers_of_two(numbers[::4] / 4, torch.float32))
    assert torch.allclose(fine, torch.exp2(numbers.float() / 4), rtol=1e-4)
    assert all(each * 2**12 == int(each * 2**12) for each in QUARTERS)  # 13 bits
    assert torch.equal(scales(numbers[42:71], EXACT_STEPS), torch.exp2(numbers[42:71].float()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_is_rounded_once(dtype: torch.dtype) -> None:
    """Also where rows and columns are scaled both."""
    values, rows, columns = some(dtype), exponents(5, 12, 0), exponents(40, 12, 1)
    found = scaled(values, FINE_STEPS, rows=rows, columns=columns)
    assert found.dtype == dtype
    for i, row in enumerate(rows.tolist()):
        for j, column in enumerate(columns.tolist()):
            exact = Fraction(float(values[i, j])) * scale_of(column) / scale_of(-row)
            assert float(found[i, j]) == nearest(exact, float(exact), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_powers_of_two_are_undone_without_a_trace_and_finer_scales_within_a_digit(dtype: torch.dtype) -> None:
    values, rows, columns = some(dtype), exponents(5, 3, 0), exponents(40, 3, 1)
    for steps in (EXACT_STEPS, FINE_STEPS):
        there = scaled(values, steps, rows=rows, columns=columns)
        back = scaled(there, steps, rows=rows, columns=columns, undo=True)
        apart = (back.double() - values.double()).abs()
        most = 0.0 if steps == EXACT_STEPS else torch.finfo(dtype).eps
        assert bool((apart <= most * values.double().abs()).all())


@pytest.mark.parametrize("steps", [EXACT_STEPS, FINE_STEPS])
def test_the_result_can_be_put_somewhere(steps: Steps) -> None:
    values, columns = some(torch.bfloat16), exponents(40, 3, 1)
    place = torch.empty_like(values)
    assert torch.equal(scaled(values, steps, columns=columns, out=place), scaled(values, steps, columns=columns))
    assert torch.equal(place, scaled(values, steps, columns=columns))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_that_is_not_the_nearest_is_found(dtype: torch.dtype) -> None:
    before = torch.cat([some(dtype, 1, 400)[0], torch.tensor([0.0, -0.0, float("inf"), float("nan")]).to(dtype)])
    rows = exponents(404, 12, 0)
    after = scaled(before[:, None], FINE_STEPS, rows=rows)[:, 0]
    assert bool(is_nearest(before, after, rows, FINE_STEPS).all())
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for step in (-1, 1):
        moved = (after.view(bits) + step).view(dtype)
        assert not bool(is_nearest(before, moved, rows, FINE_STEPS)[:400].any())
    assert not bool(is_nearest(before, -after, rows, FINE_STEPS)[:403].any())
