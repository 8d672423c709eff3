"""Loads a PyTorch file with torch itself: tensors by name, or an error that says what else the file contains.

Owns the calls of torch's unpickler, which may only build tensors, and what its failures mean to a user. Does not know
where bytes are.
"""

from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, BinaryIO

from int8cli.checkpoint.disk import GET_IT_AGAIN, raise_if_of_the_system
from int8cli.checkpoint.tensor import TORCH_NAMES, TensorSpec
from int8cli.errors import CheckpointError, CorruptShardError, Int8cliError, UnsafePickleError

if TYPE_CHECKING:
    from torch import Tensor

RESAVE_HINT = (
    "Load it with the program that wrote it, and save only its state_dict(), preferably with save_pretrained()."
)

# torch's name of a dtype → the name in safetensors.
DTYPES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


def load_weights(file: BinaryIO, file_name: str, device: str) -> Any:
    """torch.load with weights_only.

    Raises UnsafePickleError for forbidden content, CorruptShardError for a damaged file, and CheckpointError for
    tensors that cannot be described without their data.
    """
    import torch

    try:
        return torch.load(file, weights_only=True, map_location=device, mmap=False)
    except Int8cliError:  # an error of reading the file, not of the pickle
        raise
    except NotImplementedError as error:
        raise CheckpointError(
            f"{file_name} holds tensors that cannot be described without their data, such as quantized ones",
            hint="Save it again with dense tensors of an ordinary dtype.",
        ) from error
    except UnpicklingError as error:
        raise UnsafePickleError(
            f"{file_name} holds something other than tensors, or is damaged; it is not unpickled", hint=RESAVE_HINT
        ) from error
    # For a damaged pickle, the unpickler and the functions that it calls may raise anything.
    except Exception as error:
        raise_if_of_the_system(error)
        raise CorruptShardError(
            f"{file_name}: its pickle cannot be read: {type(error).__name__}: {str(error)[:200]}", hint=GET_IT_AGAIN
        ) from error


def named_tensors(loaded: Any, file_name: str) -> dict[str, "Tensor"]:
    """The tensors of a state dict. Raises UnsafePickleError for anything but tensors with plain names.

    Attributes that a pickle sets on a tensor, which could replace its methods, are left behind.
    """
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
    return {name: torch.Tensor.detach(tensor) for name, tensor in loaded.items()}


def spec_of(name: str, tensor: "Tensor", file_name: str) -> TensorSpec:
    """The tensor's name, dtype and shape for safetensors. Raises CheckpointError if the format does not support it."""
    import torch

    layout = str(tensor.layout).removeprefix("torch.")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise CheckpointError(f"{file_name}: tensor {name!r} is {layout}, and safetensors holds dense tensors only")
    if tensor.is_quantized or dtype not in DTYPES:
        raise CheckpointError(f"{file_name}: tensor {name!r} has the dtype {dtype}, which safetensors does not know")
    if tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(f"{file_name}: tensor {name!r} is stored as the conjugate or the negative of its values")
    return TensorSpec(name, DTYPES[dtype], tuple(tensor.shape))
