"""How long the arithmetic of a calibration will take on this machine."""

import time

import torch

from int8cli.workers.torch_threads import torch_threads

_SIZE = 1024
_LONG_ENOUGH_S = 0.05


def arithmetic_s(parameters: int, tokens: int, dtype: torch.dtype, device: str, threads: int) -> float:
    """Seconds for one forward pass of `tokens` through linears with `parameters`, from a product that is timed here.

    Counts two operations for each parameter and token. Attention and everything else is not counted.
    """
    with torch_threads(threads):
        return 2.0 * parameters * tokens / _operations_a_second(dtype, device)


def _operations_a_second(dtype: torch.dtype, device: str) -> float:
    x = torch.ones(_SIZE // 2, _SIZE, dtype=dtype, device=device)
    weight = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    _timed(x, weight)  # warm up: the first product includes torch's own set-up
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
