"""A temporary number of threads for torch.

A model needs all cores. A pass over blocks needs one torch thread: it has its own threads, and torch's, which are woken
for each small operation, cost fifteen times the work if anything else runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
