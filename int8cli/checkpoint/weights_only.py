"""What torch itself makes of a PyTorch file: tensors by name, or why the file holds something else.

Owns the calls of torch's unpickler, which is given tensors alone to make, and what its failures mean to a user. Knows
nothing of where bytes lie.
"""

from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, BinaryIO

from int8cli.checkpoint.disk import GET_IT_AGAIN
from int8cli.checkpoint.tensor import TORCH_NAMES, TensorSpec
from int8cli.errors import CheckpointError, CorruptShardError, Int8cliError, UnsafePickleError

if TYPE_CHECKING:
    from torch import Tensor

RESAVE_HINT = "Load it where it was made and save its state_dict() alone, best with save_pretrained()."

# What safetensors calls the dtypes of torch.
DTYPES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


def load_weights(file: BinaryIO, file_name: str, device: str) -> Any:
    """torch.load of tensors alone, its failures told apart: forbidden content, or a broken file."""
    import torch

    try:
        return torch.load(file, weights_only=True, map_location=device, mmap=False)
    except Int8cliError:  # of the reading, not of the pickle
        raise
    except NotImplementedError as error:
        raise CheckpointError(
            f"{file_name} holds tensors that cannot be described without their data, such as quantized ones",
            hint="Save it again with dense tensors of an ordinary dtype.",
        ) from error
    except UnpicklingError as error:
        found = ", ".join(_forbidden_globals(file))
        raise UnsafePickleError(
            f"{file_name} holds {found or 'what no list of tensors does, or is damaged'}; it is not unpickled",
            hint=RESAVE_HINT,
        ) from error
    # What a damaged pickle makes the unpickler and the functions that it may call raise is not for us to list.
    except Exception as error:
        raise CorruptShardError(
            f"{file_name}: its pickle cannot be read: {type(error).__name__}: {str(error)[:200]}", hint=GET_IT_AGAIN
        ) from error


def _forbidden_globals(file: BinaryIO) -> list[str]:
    """The names that a zip file's pickle would import beyond those of tensors, read off without running it."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    file.seek(0)
    try:
        return sorted(get_unsafe_globals_in_checkpoint(file))
    except Exception:  # a pickle bad enough to fail here has been refused already; only its explanation is lost
        return []


def named_tensors(loaded: Any, file_name: str) -> dict[str, "Tensor"]:
    """A state dict and nothing else: what is no plain tensor under a plain name is refused."""
    import torch

    if not isinstance(loaded, dict):
        raise UnsafePickleError(
            f"{file_name} holds one object of type {type(loaded).__name__}, not tensors by name", hint=RESAVE_HINT
        )
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise UnsafePickleError(f"{file_name} names an entry {str(name)[:80]}, of type {type(name).__name__}")
        if not isinstance(value, torch.Tensor):
            raise UnsafePickleError(
                f"{file_name} holds more than tensors: {name!r} is of type {type(value).__name__}", hint=RESAVE_HINT
            )
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise CorruptShardError(f"{file_name}: the name {name!r} is not text")
    return dict(loaded)


def spec_of(name: str, tensor: "Tensor", file_name: str) -> TensorSpec:
    """What safetensors would call the tensor. Raises CheckpointError where it has no word for it."""
    import torch

    layout = str(tensor.layout).removeprefix("torch.")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise CheckpointError(f"{file_name}: tensor {name!r} is {layout}, and safetensors holds dense tensors only")
    if tensor.is_quantized or dtype not in DTYPES:
        raise CheckpointError(f"{file_name}: tensor {name!r} has the dtype {dtype}, which safetensors does not know")
    if tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(f"{file_name}: tensor {name!r} is stored as the conjugate or negative of its values")
    return TensorSpec(name, DTYPES[dtype], tuple(tensor.shape))
