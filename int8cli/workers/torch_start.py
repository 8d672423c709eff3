"""How torch is imported, with which number of threads, and how the caller's number is restored.

Owns torch's global settings in this program.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_threads_before: list[int] = []  # what torch had when this program first changed it


def start_torch() -> None:
    """Import torch and set it to one thread: int8cli has its own, and OpenMP's slow down badly beside other work."""
    import torch

    if not _threads_before:
        _threads_before.append(torch.get_num_threads())
    torch.set_num_threads(1)


def start_torch_unless_started() -> None:
    """Import torch as `start_torch` does; where the caller has imported it, its number of threads stays.

    In a fork of a process that has computed, torch's first call makes its pool of threads anew. Two threads that do so
    at once find none ("Invalid thread pool!"): hence a call from here, before there are two.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        start_torch()
    else:
        torch.set_num_threads(torch.get_num_threads())


@contextmanager
def torch_threads_restored() -> Iterator[None]:
    """After this context, torch has as many threads as before it, or its default if it was not yet imported."""
    already = sys.modules.get("torch")
    before = already.get_num_threads() if already is not None else None
    try:
        yield
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and (before is not None or _threads_before):
            torch.set_num_threads(_threads_before[0] if before is None else before)
