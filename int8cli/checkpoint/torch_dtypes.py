"""The dtypes of a checkpoint as torch has them.

Owns nothing but the look-up: the names are those of `tensor`, which needs no torch.
"""

import torch

from int8cli.checkpoint.tensor import TORCH_NAMES

# An older torch lacks the latest of them.
TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items() if hasattr(torch, torch_name)
}
