"""A tensor on disk: its name, dtype, shape and the place of its bytes.

Owns the dtype names (those of the safetensors format) and their widths. Knows no file format.
"""

import math
from dataclasses import dataclass, replace

# https://github.com/huggingface/safetensors, `Dtype`. Widths in bits: F4 and the 6-bit floats are packed.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

# Their names in torch and config.json. torch does not have the packed ones.
TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
QUANTIZABLE_DTYPES = frozenset({"F32", "F16", "BF16"})
# The floats that loaders cast to the model's dtype.
CAST_ON_LOAD = QUANTIZABLE_DTYPES | {"F64", "F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its place, which is enough to plan with."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the place of its bytes: `nbytes` bytes of its file, little-endian, from `offset_bytes` on.

    Row-major, unless `column_major`: then the bytes are those of the row-major transpose (a `.bin` of a saved `W.t()`).
    `whole` is the tensor of the file if this is only a matrix in it. The lines of a column-major part may be `pitch`
    elements apart, with other parts between them.
    """

    spec: TensorSpec
    offset_bytes: int
    column_major: bool = False
    whole: "StoredTensor | None" = None
    pitch: int | None = None

    @property
    def span_bytes(self) -> int:
        """The size of the region of the file from the tensor's first byte to its last."""
        if self.pitch is None or not self.spec.numel:
            return self.spec.nbytes
        rows, columns = self.spec.shape
        return ((columns - 1) * self.pitch + rows) * DTYPE_BITS[self.spec.dtype] // 8

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.span_bytes


@dataclass(frozen=True, slots=True)
class ShardContents:
    """One checkpoint file without its data: its tensors in file order, its metadata, its size.

    `mappable` is false for a legacy `.bin`, which can only be loaded whole. Its offsets are those in the concatenation
    of its tensors.
    """

    file_name: str
    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]
    file_bytes: int
    mappable: bool = True

    def as_in_file(self) -> "ShardContents":
        """The same file with its own tensors in place of their parts."""
        return replace(self, tensors=tuple(dict.fromkeys(stored.whole or stored for stored in self.tensors)))
