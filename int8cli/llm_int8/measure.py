"""The output error of a linear in int8, measured on some of its inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from int8cli.llm_int8.matmul import InputScheme, Int8Weight, llm_int8_linear
from int8cli.llm_int8.quantize import quantize_rowwise

_ROWS_BYTES = 1 << 25


def measured_output_errors(
    inputs: Tensor, weight: Tensor, stored: Sequence[int], scheme: InputScheme
) -> tuple[float, float]:
    """||error|| / ||X Wᵀ|| of the LLM.int8() product, twice: with every column in int8, and with `stored` ones exact.

    inputs: (positions, in_features), weight: (out_features, in_features), on one device and in one dtype. The reference
    is the float32 product. Works on blocks of rows, so memory does not grow with the weight. Both errors are 0 if the
    output is 0.
    """
    columns = torch.tensor(list(stored), dtype=torch.int64, device=weight.device)
    whole = inputs.float()
    total, error, error_stored = 0.0, 0.0, 0.0
    step = max(1, _ROWS_BYTES // max(1, weight.shape[1] * 4))
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step].contiguous()
        exact = whole @ rows.float().t()
        data, row_absmax = quantize_rowwise(rows)
        plain = llm_int8_linear(inputs, Int8Weight.of(data, row_absmax), scheme)
        mixed = llm_int8_linear(inputs, Int8Weight.of(data, row_absmax, columns, rows[:, columns]), scheme)
        total += float(exact.square().sum(dtype=torch.float64))
        error += float((plain - exact).square_().sum(dtype=torch.float64))
        error_stored += float((mixed - exact).square_().sum(dtype=torch.float64))
    if total <= 0.0:
        return 0.0, 0.0
    return (error / total) ** 0.5, (error_stored / total) ** 0.5
