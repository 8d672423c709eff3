"""Serializes a few tensors to the bytes of a safetensors file.

For our own small files. `safetensors.torch.save` needs numpy before release 0.8, which the package does not install.
"""

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from int8cli.checkpoint.header import encode_header
from int8cli.checkpoint.tensor import TensorSpec

_DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The same bytes that `safetensors.torch.save` returns for tensors on the CPU.

    Raises CheckpointError for names that the format does not allow.
    """
    specs = [TensorSpec(name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    header, places = encode_header(specs, metadata or {})
    return header + b"".join(_bytes(tensors[place.spec.name]) for place in places)


def _bytes(tensor: Tensor) -> bytes:
    contiguous = tensor.detach().cpu().contiguous()
    return ctypes.string_at(contiguous.data_ptr(), contiguous.nbytes) if contiguous.nbytes else b""
