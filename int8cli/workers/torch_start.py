"""How torch comes into a process.

Owns what holds for torch as a whole in this program. Everything else imports torch where it needs it.
"""


def start_torch() -> None:
    """Import torch, with one thread: threads over blocks are ours, and OpenMP's collapse beside other work."""
    import torch

    torch.set_num_threads(1)
