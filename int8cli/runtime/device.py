"""The device that a model runs on, asked of torch before anything is loaded."""

import torch

from int8cli.errors import OptionError


def usable_device(device: str | torch.device | None) -> torch.device:
    """This device or, for None, the GPU if there is one. Raises OptionError for one that torch cannot use."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # a build without CUDA asserts
        first_line = str(error).splitlines()[0]
        raise OptionError(f"torch cannot use the device {str(device)!r}: {first_line:.200}", option="device") from error
    return found
