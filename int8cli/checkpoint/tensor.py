"""A tensor on disk: its name, dtype, shape and the place of its bytes.

Owns the dtype names (those of the safetensors format) and their widths. Knows no file format.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
    elements apart, with other parts between them. A `scaled` tensor has other bytes in the file than `spec` says: 8-bit
    floats, which stand for the values of `spec` together with their scales.
    """

    spec: TensorSpec
    offset_bytes: int
    column_major: bool = False
    whole: "StoredTensor | None" = None
    pitch: int | None = None
    scaled: "Scaled | None" = None

    @property
    def file_dtype(self) -> str:
        """The dtype of the bytes in the file."""
        return self.spec.dtype if self.scaled is None else self.scaled.codes.spec.dtype

    @property
    def file_nbytes(self) -> int:
        """The number of the tensor's own bytes in the file."""
        return self.spec.numel * DTYPE_BITS[self.file_dtype] // 8

    @property
    def span_bytes(self) -> int:
        """The size of the region of the file from the tensor's first byte to its last."""
        if self.pitch is None or not self.spec.numel:
            return self.file_nbytes
        rows, columns = self.spec.shape
        return ((columns - 1) * self.pitch + rows) * DTYPE_BITS[self.file_dtype] // 8

    @property
    def in_file(self) -> "StoredTensor":
        """The tensor that the file has in this place."""
        whole = self.whole or self
        return whole if whole.scaled is None else whole.scaled.codes

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.span_bytes


@dataclass(frozen=True, slots=True)
class Scaled:
    """What a tensor of 8-bit floats and its scales stand for: each float times the scale of its block.

    `codes` is the tensor of the file: matrices in its last two dimensions. Each block of `block` = (rows, columns)
    elements of a matrix has one scale; the last blocks of a row or a column may be smaller. `scales` has the scales of
    all matrices, row-major, and lies in the file `scales_file`. `exponents`: they are bytes that stand for
    2 ** (byte - 127). A part begins at the row and column `first` of `codes`, the rows of all matrices counted through,
    and is `turned` if it is a transpose.
    """

    codes: StoredTensor
    scales: StoredTensor
    scales_file: str
    block: tuple[int, int]
    exponents: bool = False
    first: tuple[int, int] = (0, 0)
    turned: bool = False

    @property
    def grid_rows(self) -> int:
        """Rows of scales for each matrix."""
        return -(-self.codes.spec.shape[-2] // self.block[0])

    @property
    def grid_columns(self) -> int:
        return -(-self.codes.spec.shape[-1] // self.block[1])

    def grid_row(self, row: int) -> int:
        """The row of scales for a row of `codes`."""
        matrix, inner = divmod(row, self.codes.spec.shape[-2])
        return matrix * self.grid_rows + inner // self.block[0]

    def group_end(self, row: int) -> int:
        """The first row after this one that has another row of scales."""
        rows = self.codes.spec.shape[-2]
        matrix, inner = divmod(row, rows)
        return matrix * rows + min(rows, (inner // self.block[0] + 1) * self.block[0])


@dataclass(frozen=True, slots=True)
class ShardContents:
    """One checkpoint file without its data: its tensors in file order, its metadata, its size.

    `mappable` is false for a legacy `.bin`, which can only be loaded whole. Its offsets are those in the concatenation
    of its tensors. `unread` are tensors of the file that are no weights by themselves, as the scales of others.
    `borrowed` are the bytes of scales that tensors here need and that lie in other files, by name.
    """

    file_name: str
    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]
    file_bytes: int
    mappable: bool = True
    unread: tuple[StoredTensor, ...] = ()
    borrowed: Mapping[str, bytes] = field(default_factory=dict)

    def as_in_file(self) -> "ShardContents":
        """The same file with the tensors that it has itself: no parts, no floats that others stand for."""
        tensors = dict.fromkeys((*(stored.in_file for stored in self.tensors), *self.unread))
        if not self.unread:
            return replace(self, tensors=tuple(tensors), borrowed={})
        ordered = sorted(tensors, key=lambda each: (each.offset_bytes, each.end_bytes, each.spec.name))
        return replace(self, tensors=tuple(ordered), unread=(), borrowed={})

    def unsplit(self) -> "ShardContents":
        """The same file with whole tensors in place of their parts."""
        return replace(self, tensors=tuple(dict.fromkeys(stored.whole or stored for stored in self.tensors)))
