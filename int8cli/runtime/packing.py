"""Lays the weights of a loaded model out for fast products, in threads.

Owns how many layers are packed at a time, and that what packing frees goes back to the system.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from int8cli.model.memory import address_space_limit, return_freed_memory
from int8cli.runtime.linear import Int8Linear
from int8cli.workers.torch_threads import torch_threads

# malloc keeps what it could return: packing SmolLM2-135M takes 139 MB more at its peak, or 46 MB if that is returned.
_RETURNED_BYTES = 16 << 20
_MOST_THREADS = 8  # each needs memory for one weight more


def pack_layers(layers: Sequence[Int8Linear]) -> None:
    """Call `prepare` on every layer. torch packs a weight in one thread, 2 to 3 ns for each value.

    Where the system may refuse memory, layers are packed one at a time: a layer is packed only if there is room for it,
    and another thread could take that room.
    """
    threads = 1 if address_space_limit() is not None else min(torch.get_num_threads(), _MOST_THREADS)
    freed_bytes = 0
    with torch_threads(1), ThreadPoolExecutor(threads, thread_name_prefix="int8cli-packing") as pool:
        for layer in pool.map(_packed, layers):
            freed_bytes += layer.weight.numel()
            if freed_bytes >= _RETURNED_BYTES:
                return_freed_memory()
                freed_bytes = 0


def _packed(layer: Int8Linear) -> Int8Linear:
    layer.prepare()
    return layer
