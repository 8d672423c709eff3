"""How torch comes into a process: its own threads off, and the collector too while it comes.

Owns what holds for torch as a whole in this program. Everything else imports torch where it needs it.
"""

import gc


def start_torch() -> None:
    """Import torch, with one thread: threads over blocks are ours, and OpenMP's collapse beside other work.

    The import makes objects by the hundred thousand, and all of them stay: the collector, which looks through them
    again and again meanwhile, would take a fifth of its time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        import torch
    finally:
        if collecting:
            gc.enable()
    torch.set_num_threads(1)
