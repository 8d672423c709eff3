"""The product of each method, compared with float64, with integers beyond float32, and with bitsandbytes itself."""

import pytest
import torch
from torch import Tensor

from int8cli.llm_int8.baselines import (
    Span,
    bitsandbytes_linear,
    exact_columns_linear,
    matrix_product,
    outlier_columns,
    quantize_matrix,
    quantize_weight,
    restored_weight,
)
from int8cli.llm_int8.matmul import InputScheme
from int8cli.llm_int8.quantize import quantize_rowwise

SPANS = [(inputs, weight) for inputs in ("tensor", "row") for weight in ("tensor", "row")]


def some(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs_with_outliers(tokens: int, features: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    inputs = some(tokens, features, seed=1)
    inputs[0, 3], inputs[2, 3], inputs[1, 11] = 20.0, -9.0, 6.0
    inputs[4] = 0.0
    return inputs.to(dtype)


@pytest.mark.parametrize("scheme", ["absmax", "zeropoint"])
@pytest.mark.parametrize(("inputs_by", "weight_by"), SPANS)
def test_a_product_equals_that_of_the_dequantized_values(scheme: InputScheme, inputs_by: Span, weight_by: Span) -> None:
    inputs, weight = some(9, 40) + 0.7, some(13, 40, seed=2) * 0.1 - 0.02
    left, right = quantize_matrix(inputs, scheme, inputs_by), quantize_matrix(weight, scheme, weight_by)
    meant = []
    for values, matrix in ((inputs, left), (weight, right)):
        zero = 0 if matrix.zero_point is None else matrix.zero_point[:, None]
        restored = (matrix.data.double() - zero) * matrix.step.double()[:, None]
        # nothing is further from its int8 value than half a step, but for the step's own rounding and the zero point's
        assert float(((restored - values.double()).abs() / matrix.step.double()[:, None]).max()) <= 1.0
        meant.append(restored)
    torch.testing.assert_close(matrix_product(left, right).double(), meant[0] @ meant[1].t(), rtol=1e-6, atol=1e-6)


def test_absmax_reaches_127_and_a_zero_point_uses_the_whole_range() -> None:
    values = torch.tensor([[0.0, 1.0, 3.0, 4.0]])
    assert quantize_matrix(values, "absmax", "row").data.tolist()[0][::3] == [0, 127]
    shifted = quantize_matrix(values, "zeropoint", "row")
    assert shifted.data.tolist() == [[-128, -64, 63, 127]]  # -128 + 63.75, 191.25, 255
    assert shifted.zero_point is not None
    assert shifted.zero_point.tolist() == [-128]


@pytest.mark.parametrize("scheme", ["absmax", "zeropoint"])
@pytest.mark.parametrize("span", ["tensor", "row"])
def test_zeros_stay_zero(scheme: InputScheme, span: Span) -> None:
    matrix = quantize_matrix(torch.zeros(3, 8), scheme, span)
    weight = quantize_matrix(some(5, 8), scheme, span)
    assert torch.equal(matrix_product(matrix, weight), torch.zeros(3, 5))


def test_one_tensor_scale_is_that_of_the_largest_row() -> None:
    values = torch.tensor([[1.0, -127.0], [0.4, 3.0]])
    matrix = quantize_matrix(values, "absmax", "tensor")
    assert matrix.step.tolist() == [1.0]
    assert matrix.data.tolist() == [[1, -127], [0, 3]]


@pytest.mark.parametrize("scheme", ["absmax", "zeropoint"])
@pytest.mark.parametrize("features", [4096, 40_000])
def test_sums_that_float32_cannot_hold_are_exact(scheme: InputScheme, features: int) -> None:
    """127 · 127 · 4096 is beyond 2^24; 255 · 255 · 40,000 is beyond int32."""
    inputs = torch.full((2, features), 3.0)
    inputs[:, 0], inputs[1, 3] = 0.0, 2.9
    weight = torch.full((2, features), 1.5)
    weight[:, 1], weight[0, 2] = 0.0, 1.49
    left, right = quantize_matrix(inputs, scheme, "row"), quantize_matrix(weight, scheme, "tensor")
    exact = [
        sum(
            (x - (0 if left.zero_point is None else int(left.zero_point[row])))
            * (w - (0 if right.zero_point is None else int(right.zero_point[0])))
            for x, w in zip(left.data[row].tolist(), right.data[out].tolist(), strict=True)
        )
        for row in range(2)
        for out in range(2)
    ]
    assert max(exact) > 2**24
    assert len(set(exact)) == 4
    counted = matrix_product(
        type(left)(left.data, torch.ones(2), left.zero_point), type(right)(right.data, torch.ones(1), right.zero_point)
    )
    assert counted.flatten().tolist() == torch.tensor(exact, dtype=torch.int64).float().tolist()


def test_weights_in_blocks_are_those_of_one_piece() -> None:
    weight = some(3000, 2048, seed=4)
    data, absmax = quantize_weight(weight)
    whole, whole_absmax = quantize_rowwise(weight)
    assert torch.equal(data, whole)
    assert torch.equal(absmax, whole_absmax)
    restored = restored_weight(data, absmax, torch.float32)
    assert torch.equal(restored, data.float() * (absmax / 127)[:, None])


def bitsandbytes_layer(weight: Tensor, bias: Tensor | None, threshold: float) -> torch.nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    layer = Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=bias is not None, has_fp16_weights=False, threshold=threshold
    )
    layer.weight.data = weight.half()
    if bias is not None:
        layer.bias.data = bias
    return layer.to("cpu").eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("threshold", [6.0, 0.0, 2.0, 100.0])
def test_bitsandbytes_method_is_bitsandbytes_to_the_bit(dtype: torch.dtype, with_bias: bool, threshold: float) -> None:
    """With 64 features its sums stay below 2^24, so it is exact on every CPU."""
    weight, bias = some(24, 64, seed=3), some(24, seed=5).to(dtype)
    inputs = inputs_with_outliers(7, 64, dtype)
    inputs[4, 0] = 0.5  # a token of zeros is NaN in its CPU path
    layer = bitsandbytes_layer(weight, bias if with_bias else None, threshold)
    with torch.no_grad():
        theirs = layer(inputs)
    data, absmax = quantize_weight(weight)
    ours = bitsandbytes_linear(inputs, data, absmax, threshold, bias if with_bias else None)
    assert ours.dtype == theirs.dtype == dtype
    assert torch.equal(ours, theirs)


def test_a_token_of_zeros_gives_the_bias() -> None:
    data, absmax = quantize_weight(some(8, 16))
    output = bitsandbytes_linear(torch.zeros(2, 16), data, absmax, 6.0, torch.arange(8.0))
    assert torch.equal(output, torch.arange(8.0).expand(2, 8))
    assert not exact_columns_linear(torch.zeros(2, 16), data, absmax, some(8, 16), 6.0).any()


def test_exact_columns_are_those_of_the_16_bit_weight() -> None:
    weight, inputs = some(12, 32, seed=6), inputs_with_outliers(6, 32)
    data, absmax = quantize_weight(weight)
    columns = outlier_columns(inputs, 6.0)
    assert columns.tolist() == [3, 11]
    rest = [column for column in range(32) if column not in (3, 11)]
    found = exact_columns_linear(inputs, data, absmax, weight, 6.0)
    inside = inputs.double().masked_fill(inputs.abs() >= 6.0, 0.0)
    scale = 127.0 / inside.abs().amax(dim=1, keepdim=True)
    steps = torch.round(torch.nan_to_num(inside * scale, nan=0.0))[:, rest] / scale
    expected = steps @ (data[:, rest].double() * absmax.double()[:, None] / 127).t()
    expected += inputs[:, columns].double() @ weight[:, columns].double().t()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_outliers_exact_columns_change_nothing() -> None:
    weight, inputs = some(12, 32, seed=6), some(6, 32, seed=7)
    data, absmax = quantize_weight(weight)
    assert not outlier_columns(inputs, 6.0).numel()
    left = quantize_matrix(inputs, "absmax", "row")
    plain = matrix_product(left, type(left)(data, absmax / 127))
    torch.testing.assert_close(exact_columns_linear(inputs, data, absmax, weight, 6.0), plain, rtol=1e-6, atol=1e-6)
