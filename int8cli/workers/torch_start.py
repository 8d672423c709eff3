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
