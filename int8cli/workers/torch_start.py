"""How torch comes into a process, and what of it is the caller's again afterwards.

Owns what holds for torch as a whole in this program. Everything else imports torch where it needs it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_threads_before: list[int] = []  # what torch had when this program first changed it


def start_torch() -> None:
    """Import torch, with one thread: threads over blocks are ours, and OpenMP's collapse beside other work."""
    import torch

    if not _threads_before:
        _threads_before.append(torch.get_num_threads())
    torch.set_num_threads(1)


@contextmanager
def torch_threads_restored() -> Iterator[None]:
    """Whatever is done in this context, torch has as many threads afterwards as it had, or would have had, before."""
    already = sys.modules.get("torch")
    before = already.get_num_threads() if already is not None else None
    try:
        yield
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and (before is not None or _threads_before):
            torch.set_num_threads(_threads_before[0] if before is None else before)
