"""How many threads of its own torch uses, for a while.

A model wants all cores; passes over blocks want one, since they bring threads of their own, and since torch's, woken
for each small operation, cost fifteen times the work where anything else runs.
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
