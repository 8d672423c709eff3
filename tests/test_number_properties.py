"""Bounds for every number that a dtype has (extremes, subnormals, both zeros), and integers without error."""

import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from int8cli.llm_int8.baselines import exact_columns_linear, matrix_product, quantize_matrix
from int8cli.llm_int8.matmul import InputScheme, Int8Weight, int8_product, quantize_tokens, vectorwise_linear
from int8cli.llm_int8.quantize import BlockQuantizer, quantize_rowwise

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
SCHEMES: tuple[InputScheme, ...] = ("absmax", "zeropoint")
# Where a sum of products leaves what float32 counts exactly (2^24), what int32 holds with zero points on both sides or
# on one, and what it holds at all.
BOUNDARIES = (1040, 1041, 33_025, 33_026, 65_793, 65_794, 131_071, 131_072, 200_003)

few = settings(max_examples=60)


def special_values(dtype: torch.dtype) -> Tensor:
    """0, the smallest and the largest subnormal, the smallest normal, 1, the largest; and the same negative."""
    limits = torch.finfo(dtype)
    smallest = torch.tensor([1], dtype=BITS[dtype]).view(dtype)
    subnormal = torch.tensor([limits.tiny], dtype=dtype).view(BITS[dtype]).sub(1).view(dtype)
    magnitudes = torch.cat([smallest, subnormal, torch.tensor([0.0, limits.tiny, 1.0, limits.max], dtype=dtype)])
    return torch.cat([magnitudes, -magnitudes])


@st.composite
def matrices(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(BITS)) -> Tensor:
    """A finite matrix: by row of one magnitude, of any bits at all, or of the values at the edges of the dtype."""
    dtype = draw(st.sampled_from(dtypes))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    made = []
    for _ in range(rows):
        kind = draw(st.sampled_from(["magnitude", "bits", "edges"]))
        if kind == "magnitude":
            exponent = draw(st.integers(-150, 127))
            row = torch.randn(columns, generator=generator, dtype=torch.float64).clamp(-1.9, 1.9) * 2.0**exponent
            row = row.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
        elif kind == "bits":
            bits = torch.iinfo(BITS[dtype])
            row = torch.randint(bits.min, bits.max, (columns,), generator=generator, dtype=BITS[dtype]).view(dtype)
            row = torch.where(row.isfinite(), row, torch.zeros((), dtype=dtype))
        else:
            edges = special_values(dtype)
            row = edges[torch.randint(len(edges), (columns,), generator=generator)]
        made.append(row)
    return torch.stack(made)


def weight_bound(weight: Tensor) -> Tensor:
    """Half a step of each row, and the rounding of the arithmetic: float64 (rows, 1).

    The scale is rounded twice and a value once, each by 2^-24 of itself; 127 / absmax is subnormal beyond 2^126, which
    makes that 2^-22. A bfloat16 row below 0.0155 goes through float16, whose subnormals are 2^-24 apart.
    """
    absmax = weight.double().abs().amax(dim=1, keepdim=True)
    bound = absmax / 254 + absmax * 2.0**-20
    if weight.dtype == torch.bfloat16:
        bound = bound + torch.where(absmax <= 0.0155, 2.0**-24, 0.0)
    return bound


@few
@given(matrices())
def test_no_weight_moves_by_more_than_half_a_step(weight: Tensor) -> None:
    data, absmax = quantize_rowwise(weight)
    restored = data.double() * absmax.double()[:, None] / 127
    assert ((weight.double() - restored).abs() <= weight_bound(weight)).all()
    assert data.min() >= -127


@few
@given(matrices())
def test_the_reported_errors_are_within_the_same_bound(weight: Tensor) -> None:
    quantizer = BlockQuantizer(weight.numel())
    data, absmax = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    sums = quantizer.quantize_and_measure(weight, quantizer.row_absmax(weight), data=data, stored_absmax=absmax)
    error = (weight.double() - data.double() * absmax.double()[:, None] / 127).abs()
    assert sums.max_abs_error <= float(weight_bound(weight).max())
    assert sums.max_abs_error >= float(error.max()) * (1 - 1e-3) - float(weight_bound(weight).max()) * 1e-3
    assert sums.sum_squared_error >= 0.0


@few
@given(matrices(), st.sampled_from(SCHEMES))
def test_no_input_moves_by_more_than_half_a_step(inputs: Tensor, scheme: InputScheme) -> None:
    quantized = quantize_tokens(inputs, scheme)
    assert quantized.step.isfinite().all()
    step = quantized.step.double()[:, None]
    restored = (quantized.data.double() - quantized.zero_point.double()[:, None]) * step
    error = (inputs.double() - restored).abs()
    # With a zero point, zero moves to a whole step and both ends with it. A step under 2^-118 is rounded itself.
    plain = (step > 2.0**-118).expand_as(error)
    assert (error[plain] <= ((0.5 if scheme == "absmax" else 1.0) * step * (1 + 1e-4)).expand_as(error)[plain]).all()
    assert (error[~plain] <= 2.0**-109).all()


@few
@given(matrices(), st.sampled_from(SCHEMES), st.sampled_from(["row", "tensor"]))
def test_matrices_that_are_compared_have_finite_steps(values: Tensor, scheme: InputScheme, span: str) -> None:
    quantized = quantize_matrix(values, scheme, "row" if span == "row" else "tensor")
    assert quantized.step.isfinite().all()
    assert matrix_product(quantized, quantize_matrix(torch.full_like(values, 1e-4), scheme, "row")).isfinite().all()


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_largest_inputs_give_the_right_product(dtype: torch.dtype, scheme: InputScheme) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.where(torch.rand(5, 64, generator=generator) < 0.5, -1.0, 1.0).to(dtype) * torch.finfo(dtype).max
    data, row_absmax = quantize_rowwise(torch.randn(7, 64, generator=generator) * 0.01)
    product = vectorwise_linear(quantize_tokens(inputs, scheme), Int8Weight.of(data, row_absmax))
    exact = inputs.double() @ (data.double() * row_absmax.double()[:, None] / 127).t()
    assert float((product.double() - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("magnitude", [1e-36, 1e-38, 1e-40, 1e-45, 0.0])
def test_the_smallest_inputs_give_numbers(magnitude: float) -> None:
    inputs = torch.tensor([[magnitude, 0.0, -magnitude]])
    weight = torch.tensor([[1.0, -2.0, 3.0]])
    product = exact_columns_linear(inputs, *quantize_rowwise(weight), weight, 6.0)
    assert product.abs().max() <= 10 * magnitude + 1e-44


@st.composite
def factors(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Both sides of an int8 product, whatever their strides, at random or where every product is largest."""
    features = draw(st.one_of(st.integers(1, 300), st.sampled_from(BOUNDARIES)))
    most = 33 if features < 1000 else 3
    tokens, outs = draw(st.integers(1, most)), draw(st.integers(1, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def side(rows: int) -> Tensor:
        kind, stride = (
            draw(st.sampled_from(["any", "lowest", "ends"])),
            draw(st.sampled_from(["rows", "columns", "part"])),
        )
        shape = (rows + 1, features + 3) if stride == "part" else (rows, features)
        if kind == "any":
            made = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
        elif kind == "lowest":
            made = torch.full(shape, -128, dtype=torch.int8)
        else:
            made = torch.where(torch.rand(shape, generator=generator) < 0.5, -128, 127).to(torch.int8)
        if stride == "part":
            return made[1:, 2:-1]
        return made if stride == "rows" else made.t().contiguous().t()

    return side(tokens), side(outs)


@settings(max_examples=150)
@given(factors())
def test_integer_products_are_exact_at_every_number_of_features(both: tuple[Tensor, Tensor]) -> None:
    left, right = both
    torch.full((len(left), len(right)), 12345, dtype=torch.int32)  # given back at once: what is not written shows it
    assert torch.equal(int8_product(left, right).long(), left.long() @ right.long().t())


@pytest.mark.parametrize("features", [*range(1, 20), *BOUNDARIES])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_with_zero_points_are_whole_numbers_without_error(features: int, scheme: InputScheme) -> None:
    generator = torch.Generator().manual_seed(features)
    inputs = quantize_tokens(torch.rand(3, features, generator=generator) + 1.0, scheme)
    data = torch.full((2, features), -127, dtype=torch.int8)
    product = vectorwise_linear(inputs, Int8Weight.of(data, torch.full((2,), 127.0)))
    whole = (inputs.data.long() - inputs.zero_point.long()[:, None]) @ data.long().t()
    exact = whole.double() * inputs.step.double()[:, None]
    assert ((product.double() - exact).abs() <= exact.abs() * 2.0**-22).all()


def test_the_first_call_of_a_vector_function_is_made_by_one_thread_on_import() -> None:
    """The first call decides the accuracy of MKL, so it must not come from several threads at once."""
    program = """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names = set()
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.add(str(function))
            return function(*args, **(kwargs or {}))

    with Seen():
        import int8cli.llm_int8.matmul, int8cli.llm_int8.outliers, int8cli.llm_int8.baselines
    print(any(name.startswith("aten.sqrt") for name in Seen.names))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"
