"""Measures the speed of this machine; takes half a second. Imports torch.

    python -m int8cli.machine.measure CORES

prints the rates as JSON, for `speed.measured_beside`.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from int8cli.llm_int8.quantize import BlockQuantizer
from int8cli.machine.speed import Speed
from int8cli.workers.torch_threads import torch_threads

_ROWS, _SIZE = 512, 2048  # as long as a sequence; with 1,024 a product reaches half of the rate that wide layers do
_BLOCK = (512, 1024)
_LONG_ENOUGH_S = 0.08


def measure(cores: int, device: str = "cpu") -> Speed:
    """The rates with so many threads. Quantizing is timed in one and counted for each."""
    with torch_threads(cores):
        bfloat16 = _operations_a_second(torch.bfloat16, device)
        float16 = _operations_a_second(torch.float16, device)
        float32 = _operations_a_second(torch.float32, device)
    with torch_threads(1):
        return Speed(bfloat16, float16, float32, cores * _quantized_bytes_a_second())


def _operations_a_second(dtype: torch.dtype, device: str) -> float:
    x = torch.ones(_ROWS, _SIZE, dtype=dtype, device=device)
    weight = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)

    def product() -> None:
        if (x @ weight.t()).is_cuda:
            torch.cuda.synchronize()

    return 2.0 * _ROWS * _SIZE * _SIZE * _times_a_second(product)


def _quantized_bytes_a_second() -> float:
    quantizer = BlockQuantizer(_BLOCK[0] * _BLOCK[1])
    block = torch.ones(_BLOCK, dtype=torch.bfloat16)
    data, absmax = torch.empty(_BLOCK, dtype=torch.int8), torch.empty(_BLOCK[0])

    def quantize() -> None:
        quantizer.quantize_and_measure(block, quantizer.row_absmax(block), data=data, stored_absmax=absmax)

    return block.numel() * block.element_size() * _times_a_second(quantize)


def _times_a_second(work: Callable[[], None]) -> float:
    """By the quickest of the runs: others are disturbed by what else the machine does."""
    work()  # the first run also sets things up
    quickest, begun_s = float("inf"), time.perf_counter()
    while time.perf_counter() - begun_s < _LONG_ENOUGH_S:
        start_s = time.perf_counter()
        work()
        quickest = min(quickest, time.perf_counter() - start_s)
    return 1.0 / max(quickest, 1e-9)


if __name__ == "__main__":
    print(json.dumps(asdict(measure(int(sys.argv[1])))))
