"""The statistics of inputs, the definition of outliers, and the predicted error of int8."""

import dataclasses
import math

import pytest
import torch

from int8cli.llm_int8 import columns, inputs
from int8cli.llm_int8.columns import choose_columns, column_errors, predicted_output_error
from int8cli.llm_int8.inputs import InputStatistics, InputSummary, NonFiniteInputError
from int8cli.llm_int8.outliers import massive_activations, systematic_features
from int8cli.llm_int8.quantize import quantize_rowwise


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def summary_of(*batches: torch.Tensor, threshold: float = 6.0) -> InputSummary:
    statistics = InputStatistics(batches[0].shape[-1], threshold=threshold)
    for batch in batches:
        statistics.update(batch)
    return statistics.summary()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (inputs, columns):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 5 * 24)  # five rows, of sequences of seven


@pytest.mark.usefixtures("small_chunks")
def test_statistics_in_batches_and_chunks_are_those_of_all_inputs() -> None:
    batches = [(noise(2, 7, 24, seed=seed) * 4).bfloat16() for seed in range(3)]
    summary = summary_of(*batches)
    x = torch.cat(batches).float()  # (6, 7, 24)
    rows = x.reshape(-1, 24)

    assert summary.positions == 42
    assert torch.equal(summary.minimum, rows.amin(0))
    assert torch.equal(summary.maximum, rows.amax(0))
    assert torch.equal(summary.absmax, rows.abs().amax(0))
    assert torch.equal(summary.absmax_later, x[:, 1:].abs().amax((0, 1)))
    assert torch.equal(summary.share_over, ((rows.abs() >= 6).double().mean(0)).float())
    assert torch.allclose(summary.mean_square, rows.square().mean(0), rtol=1e-6)
    assert summary.mean_squared_rowmax == pytest.approx(float(rows.abs().amax(1).square().mean()), rel=1e-6)
    assert summary.share_of_values_over == pytest.approx(float((rows.abs() >= 6).float().mean()))


@pytest.mark.usefixtures("small_chunks")
def test_the_place_of_an_extreme_is_counted_in_its_own_sequence() -> None:
    x = torch.zeros(3, 7, 24)
    x[1, 4, 3], x[2, 0, 5], x[0, 6, 5] = -50.0, 9.0, 8.0
    summary = summary_of(x)
    assert summary.absmax_position[[3, 5]].tolist() == [4, 0]
    assert summary.absmax_later[[3, 5]].tolist() == [50.0, 8.0]
    assert [summary.sign(3), summary.sign(5), summary.sign(0)] == ["-", "+", ""]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_non_finite_input_is_reported_with_its_position(value: float) -> None:
    x = torch.zeros(2, 7, 24)
    x[1, 5, 17] = value
    with pytest.raises(NonFiniteInputError) as caught:
        summary_of(x)
    assert (caught.value.position, caught.value.dimension) == (5, 17)


def layer_with(share: float, *, dimension: int = 2, value: float = -8.0, positions: int = 100) -> list[InputSummary]:
    x = torch.zeros(1, positions, 4)
    x[0, : round(share * positions), dimension] = value
    return [summary_of(x)]


def test_a_feature_is_in_a_quarter_of_the_layers_and_six_percent_of_the_positions() -> None:
    found = systematic_features([layer_with(0.24), layer_with(0), layer_with(0), layer_with(0)])
    assert [(f.dimension, f.layers, f.sign, f.largest) for f in found] == [(2, (0,), "-", 8.0)]
    assert found[0].position_share == pytest.approx(0.06)
    assert found[0].peak_share == pytest.approx(0.24)


def test_too_few_layers_or_positions_are_not_a_feature() -> None:
    assert systematic_features([layer_with(0.9), *(layer_with(0) for _ in range(4))]) == ()
    assert systematic_features([layer_with(0.23), layer_with(0), layer_with(0), layer_with(0)]) == ()
    assert systematic_features([layer_with(1.0, value=5.99)]) == ()
    assert systematic_features([]) == ()


def test_massive_activations_are_far_above_the_median() -> None:
    x = noise(1, 400, 8) * 0.01
    x[0, 0, 3] = -2700.0
    x[0, 9, 6] = 99.0
    [found] = massive_activations(summary_of(x))
    assert (found.dimension, found.value, found.position) == (3, -2700.0, 0)
    assert found.later < 0.1
    assert massive_activations(summary_of(x * 0 + 500.0)) == ()  # all alike, however large


def test_column_errors_equal_those_of_the_int8_weight() -> None:
    weight = noise(37, 24)
    data, absmax = quantize_rowwise(weight)
    error = weight - data.float() * (absmax / 127)[:, None]
    errors, sum_squares = column_errors(weight)
    assert torch.allclose(errors, error.square().sum(0), rtol=1e-5)
    assert sum_squares == pytest.approx(float(weight.square().sum()), rel=1e-6)


@pytest.mark.usefixtures("small_chunks")
def test_column_errors_do_not_depend_on_the_blocks() -> None:
    weight = noise(37, 24)
    blockwise, sum_squares = column_errors(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_CHUNK_ELEMENTS", 1 << 20)
        whole, whole_sum = column_errors(weight)
    assert torch.allclose(blockwise, whole, rtol=1e-6)
    assert sum_squares == pytest.approx(whole_sum)


@pytest.mark.parametrize("int8_inputs", [False, True])
def test_the_predicted_output_error_is_the_measured_one(int8_inputs: bool) -> None:
    """On inputs with uneven second moments, where the weight's own error would mislead."""
    scales = torch.exp(noise(256, seed=3) * 0.5)
    x, weight = noise(2000, 256, seed=1) * scales, noise(128, 256, seed=2)
    data, absmax = quantize_rowwise(weight)
    int8_weight = data.double() * (absmax.double() / 127)[:, None]
    exact = x.double() @ weight.double().T
    given = x.double()
    if int8_inputs:
        x_data, x_absmax = quantize_rowwise(x)
        given = x_data.double() * (x_absmax.double() / 127)[:, None]
    measured = float(torch.linalg.norm(given @ int8_weight.T - exact) / torch.linalg.norm(exact))

    summary = summary_of(x[None])
    errors, sum_squares = column_errors(weight)
    predicted = predicted_output_error(
        summary.mean_square,
        errors,
        float(exact.square().sum(1).mean()),
        mean_squared_rowmax=summary.mean_squared_rowmax if int8_inputs else 0.0,
        weight_sum_squares=sum_squares if int8_inputs else 0.0,
    )
    assert predicted == pytest.approx(measured, rel=0.03)


def test_exact_columns_add_nothing_to_the_predicted_error() -> None:
    mean_square, errors = torch.tensor([1.0, 4.0, 100.0]), torch.tensor([1.0, 1.0, 1.0])
    assert predicted_output_error(mean_square, errors, 1.0) == pytest.approx(math.sqrt(105))
    assert predicted_output_error(mean_square, errors, 1.0, exact=(2,)) == pytest.approx(math.sqrt(5))
    assert predicted_output_error(mean_square, errors, 0.0) == 0.0


def test_the_columns_chosen_are_those_of_the_most_energy_times_error() -> None:
    x = torch.zeros(1, 100, 6)
    x[0, :, 1] = 2.0
    x[0, :, 3] = 3.0
    x[0, 0, 4] = 10.0  # once, and the largest: E[x²] = 1, where the others have 4 and 9
    summary, errors = summary_of(x), torch.tensor([9.0, 5.0, 9.0, 1.0, 5.0, 1.0])  # 5 on average
    assert choose_columns(summary, errors, 1) == (3,)  # 4 (5 + 5) < 9 (1 + 5)
    assert choose_columns(summary, errors, 2) == (1, 3)
    assert choose_columns(summary, errors, 6) == (1, 3, 4)  # the others were always 0
    assert choose_columns(summary, errors, 0) == ()
    smoothed = dataclasses.replace(summary, smoothed=True)  # the mean counts a third: 4 (5 + 5/3) > 9 (1 + 5/3)
    assert choose_columns(smoothed, errors, 1) == (1,)


def test_a_column_that_enlarges_every_scale_is_chosen_although_its_weight_has_no_error() -> None:
    x = noise(1, 100, 8)
    x[0, :, 5] += 50.0
    errors = torch.full((8,), 0.1)
    errors[5] = 0.0
    assert choose_columns(summary_of(x), errors, 1) == (5,)
