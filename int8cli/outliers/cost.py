"""How long the arithmetic of a calibration takes on this machine, told before it starts."""

import time

import torch

from int8cli.workers.torch_threads import torch_threads

_SIZE = 1024
_LONG_ENOUGH_S = 0.05


def arithmetic_s(parameters: int, tokens: int, dtype: torch.dtype, device: str, threads: int) -> float:
    """Seconds for one forward of `tokens` through linears of so many parameters, by the rate of a product timed here.

    Two operations for each parameter and token; attention and everything else comes on top.
    """
    with torch_threads(threads):
        return 2.0 * parameters * tokens / _operations_a_second(dtype, device)


def _operations_a_second(dtype: torch.dtype, device: str) -> float:
    x = torch.ones(_SIZE // 2, _SIZE, dtype=dtype, device=device)
    weight = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    _timed(x, weight)  # the first product also sets things up
    count, elapsed = 0, 0.0
    while elapsed < _LONG_ENOUGH_S:
        count, elapsed = count + 1, elapsed + _timed(x, weight)
    return count * 2.0 * x.shape[0] * _SIZE * _SIZE / elapsed


def _timed(x: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    product = x @ weight.t()
    if product.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
