"""The error of a linear's output in int8, and which input columns are worth storing exactly.

Owns the prediction of the error from the second moments of the inputs, and the choice of the columns. Knows no model,
layer name or file.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from int8cli.llm_int8.inputs import InputSummary
from int8cli.llm_int8.quantize import INT8_MAX, BlockQuantizer

_CHUNK_ELEMENTS = 1 << 21
# The error of rounding to steps of size 1 is uniform over [-1/2, 1/2]: its mean square is 1/12.
ROUNDING_VARIANCE = 1.0 / 12.0
# How much of the step of the inputs storing a column is taken to save in a smoothed model: measured, as below.
_STEP_SHARE_ONCE_SMOOTHED = 1.0 / 3.0


def column_errors(weight: Tensor) -> tuple[Tensor, float]:
    """The squared error of each column of a weight (out, in) after rounding to int8, and the weight's squared norm.

    Returns ||dW_:j||² as float32 (in,), with dW = W - data * row_absmax / 127, and ||W||². Works on blocks of rows.
    Raises NonFiniteWeightError, whose row is counted within its block.
    """
    out_features, in_features = weight.shape
    errors = torch.zeros(in_features, dtype=torch.float64, device=weight.device)
    rows = max(1, _CHUNK_ELEMENTS // max(1, in_features))
    quantizer = BlockQuantizer(min(rows, max(1, out_features)) * in_features, device=str(weight.device))
    data = torch.empty((min(rows, out_features), in_features), dtype=torch.int8, device=weight.device)
    absmax = torch.empty(min(rows, out_features), device=weight.device)
    sum_squares = 0.0
    for start in range(0, out_features, rows):
        block = weight[start : start + rows].contiguous()
        count = block.shape[0]
        found = quantizer.row_absmax(block)
        sums = quantizer.quantize_and_measure(block, found, data=data[:count], stored_absmax=absmax[:count])
        restored = data[:count].float().mul_((absmax[:count] / INT8_MAX)[:, None])
        errors += restored.sub_(block).square_().sum(dim=0).double()
        sum_squares += sums.sum_squared_weight
    return errors.float(), sum_squares


def predicted_output_error(
    mean_square: Tensor,
    column_error: Tensor,
    output_mean_square: float,
    *,
    mean_squared_rowmax: float = 0.0,
    weight_sum_squares: float = 0.0,
    exact: Sequence[int] = (),
) -> float:
    """Relative error of a linear's output, ||error|| / ||X Wᵀ||, expected when W is int8.

    err² = ( Σ_j E[x_j²] ||dW_:j||² + E[rowmax²] / (127² · 12) · ||W||² ) / E||X Wᵀ||²

    mean_square E[x_j²] and column_error ||dW_:j||² are (in,); `output_mean_square` is the mean over positions of the
    squared length of the output without its bias. The second term is the rounding of the inputs, with one scale for
    each token: omit its two keyword arguments for inputs in 16 bit. Columns in `exact` add nothing to the first term.
    Returns 0 if the output is 0.
    """
    if output_mean_square <= 0.0:
        return 0.0
    parts = mean_square.double() * column_error.double()  # (in,)
    if len(exact):
        parts[torch.as_tensor(list(exact), dtype=torch.long)] = 0.0
    inputs = mean_squared_rowmax * ROUNDING_VARIANCE / (INT8_MAX * INT8_MAX) * weight_sum_squares
    return math.sqrt((float(parts.sum()) + inputs) / output_mean_square)


def choose_columns(summary: InputSummary, column_error: Tensor, limit: int) -> tuple[int, ...]:
    """The input columns that are most worth storing exactly, at most `limit`, sorted by index.

    Ranked by `column_savings`. Ties go to the lower index. Columns that were always 0 are never chosen.

    Measured as KL divergence from 16 bit in nats, on SmolLM2-135M with 8 columns of each linear and text that was not
    used to calibrate: 0.0056. Ranking by |x| gives 0.0063, by |x| without first tokens 0.0075, and by |x| and
    E[x_j²] ||dW_:j||² in turn 0.0060.
    """
    score = column_savings(summary.mean_square, column_error, smoothed=summary.smoothed)
    order = torch.sort(score, descending=True, stable=True).indices[:limit].tolist()
    return tuple(sorted(column for column in order if float(score[column]) > 0.0))


def column_savings(mean_square: Tensor, column_error: Tensor, *, smoothed: bool) -> Tensor:
    """What storing an input column exactly takes off the squared error of the output: float64 (in,).

    From E[x_j²] and ||dW_:j||², (in,) each:

    E[x_j²] (||dW_:j||² + mean_k ||dW_:k||²). The first term is what rounding this column adds to the output's error.
    The second is the column's share of the inputs' energy, which sets the step to which all of a token is rounded.
    Columns that were always 0 save nothing. In `smoothed` inputs many columns set the step, and storing one hardly
    makes it smaller: the second term counts a third. On SmolLM2-135M that takes the KL divergence from 0.0057 to 0.0054
    where the model is smoothed; where it is not, it would rise from 0.0056 to 0.0059 (4 x 1,024 held-out tokens).
    """
    error = column_error.double()
    return mean_square.double() * (error + error.mean() * (_STEP_SHARE_ONCE_SMOOTHED if smoothed else 1.0))


def shared_out(savings: Sequence[Tensor], costs: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    """The columns of several linears that save most for their cost, at most `budget` in all, sorted by index.

    `savings` has float64 (in,) for each linear, `costs` what one of its columns costs. Columns are taken in the order
    of savings by cost until one does not fit. Ties go to the earlier linear, then to the lower index. Columns that save
    nothing are never chosen.
    """
    if not savings:
        return []
    rates = torch.cat([found / cost for found, cost in zip(savings, costs, strict=True)])
    ends = torch.tensor([found.numel() for found in savings]).cumsum(0)
    order = torch.sort(rates, descending=True, stable=True).indices
    linear_of = torch.searchsorted(ends, order, right=True)
    fits = (torch.tensor(costs)[linear_of].cumsum(0) <= budget) & (rates[order] > 0.0)
    chosen: list[list[int]] = [[] for _ in savings]
    for place, linear in zip(order[fits].tolist(), linear_of[fits].tolist(), strict=True):
        chosen[linear].append(place - int(ends[linear]) + savings[linear].numel())
    return [tuple(sorted(columns)) for columns in chosen]
