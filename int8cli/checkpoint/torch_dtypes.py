"""The torch dtype for each dtype name of `tensor`, which itself needs no torch."""

import torch

from int8cli.checkpoint.tensor import TORCH_NAMES

# An older torch lacks the newest ones.
TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items() if hasattr(torch, torch_name)
}
