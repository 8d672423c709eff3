"""PyTorch's own files (`.bin`, `.pt`, `.pth`): the places of their tensors, without reading the tensors.

Owns the two formats of `torch.save`: a zip archive, whose records can be mapped, and the legacy sequence of pickles,
which cannot. Only tensors are ever unpickled. `state_dict_pickle` reads nearly all archives without torch. For the
others, if they are within the bounds of `pickle_bounds`, `torch.load(weights_only=True)` reads or refuses a copy of the
archive whose storages are empty: it sees no data, and no file that could be replaced meanwhile.
"""

import io
import zipfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from int8cli.checkpoint.disk import GET_IT_AGAIN
from int8cli.checkpoint.pickle_bounds import BoundedReader, PickleBoundsError, check_pickle
from int8cli.checkpoint.reader import open_to_read
from int8cli.checkpoint.stand_ins import HEAD_BYTES, refuse_stand_in
from int8cli.checkpoint.state_dict_pickle import NotAStateDictError, read_state_dict
from int8cli.checkpoint.tensor import DTYPE_BITS, ShardContents, StoredTensor, TensorSpec
from int8cli.checkpoint.weights_only import DTYPES, RESAVE_HINT, load_weights, named_tensors, spec_of
from int8cli.checkpoint.zip_records import LOCAL_MAGIC, ZipRecord, ZipRecords
from int8cli.errors import CheckpointError, CorruptShardError, UnsafePickleError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

# The old format opens with MAGIC_NUMBER, itself pickled under protocol 2.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_PICKLE_MAGIC = b"\x80"
_PICKLE_LIMIT_BYTES = 100_000_000
_LEGACY_PICKLES = 5
_STORAGES = "data/"
_WORD_BYTES = 64  # the most for records that hold a word or a number
_NUMBERS = (".format_version", ".storage_alignment")
_LATEST_VERSION = 10  # caffe2/serialize/versions.h, kMaxSupportedFileFormatVersion
_IDENTITY = ".data/serialization_id"


def read_pickled(file: BinaryIO, file_name: str, file_bytes: int) -> ShardContents:
    """Read the contents of a PyTorch file of `file_bytes` bytes from its directory and its pickle, without the weights.

    Tied tensors appear under each of their names, at one offset. A legacy file gives `mappable=False`. Raises
    CorruptShardError for a damaged file, UnsafePickleError for one with anything but named tensors, CheckpointError for
    a tensor that safetensors cannot express, UnsupportedModelError for TorchScript.
    """
    file.seek(0)
    head = file.read(HEAD_BYTES)
    refuse_stand_in(head, file_name)
    if head.startswith(LOCAL_MAGIC):
        return _read_zip(file, file_name, file_bytes)
    if head.startswith(_LEGACY_MAGIC):
        return _read_legacy(file, file_name, file_bytes)
    if head.startswith(_PICKLE_MAGIC):
        raise UnsafePickleError(
            f"{file_name} is a bare Python pickle, not a file of torch.save; it is not unpickled", hint=RESAVE_HINT
        )
    raise CorruptShardError(f"{file_name}: its {file_bytes:,} bytes do not begin like those of a PyTorch file")


def load_legacy(path: Path) -> dict[str, "Tensor"]:
    """Load all tensors of a legacy file into memory: the format has no other way to its data.

    Raises the same errors as `read_pickled`.
    """
    with open_to_read(path) as file:
        _check_legacy_pickles(file, path.name)
        return named_tensors(load_weights(file, path.name, "cpu"), path.name)


def _read_zip(file: BinaryIO, file_name: str, file_bytes: int) -> ShardContents:
    records = ZipRecords(file, file_name, file_bytes)
    pickle = _checked_pickle(records, file_name)
    plain = _plain_tensors(records, pickle, file_name)
    if plain is not None:
        return ShardContents(file_name, _in_file_order(plain), {}, file_bytes)
    _check_bounds(io.BytesIO(pickle), file_name)
    skeleton, storages = _skeleton(records, pickle)
    with _without_data():
        tensors = named_tensors(load_weights(skeleton, file_name, "meta"), file_name)
    stored = []
    for name, tensor in tensors.items():
        spec = spec_of(name, tensor, file_name)
        # The offset of the emptied record in the skeleton identifies the storage.
        record = storages.get(getattr(tensor.untyped_storage(), "_checkpoint_offset", None) or 0)
        if record is None:
            raise CheckpointError(f"{file_name}: tensor {name!r} was saved without its data")
        _require_whole(name, record, tensor.untyped_storage().nbytes(), file_name)
        stored.append(_stored_tensor(spec, tensor, record.offset_bytes, record.size_bytes, file_name))
    return ShardContents(file_name, _in_file_order(stored), {}, file_bytes)


def _checked_pickle(records: ZipRecords, file_name: str) -> bytes:
    """The archive's pickle, after checking that its other records are those of a checkpoint that can be read."""
    names = records.by_name
    if "constants.pkl" in names:
        raise UnsupportedModelError(
            f"{file_name} is a TorchScript program, not a checkpoint",
            hint="Load it with the program that wrote it, and save its state_dict() with torch.save.",
        )
    records.require_stored()
    if "data.pkl" not in names:
        raise CorruptShardError(f"{file_name} is a zip archive, but not one of torch.save: it has no data.pkl")
    byteorder = records.read("byteorder", _WORD_BYTES) if "byteorder" in names else b"little"
    if byteorder != b"little":
        raise CheckpointError(
            f"{file_name} was saved on a machine with the byte order {byteorder!r:.20}, not little-endian",
            hint="Load it with torch.load and save it again on a little-endian machine.",
        )
    for name in ("version", *(name for name in _NUMBERS if name in names)):
        number = records.read(name, _WORD_BYTES) if name in names else b""
        if not number.strip().isdigit():
            raise CorruptShardError(f"{file_name}: the record {name!r} holds {number!r:.40}, not a number")
        if name == "version" and int(number) > _LATEST_VERSION:
            raise CheckpointError(
                f"{file_name} has version {int(number)} of its format; the latest known is {_LATEST_VERSION}",
                hint="Load it with the torch that wrote it, and save it with save_pretrained().",
            )
    if _IDENTITY in names and not records.read(_IDENTITY, _WORD_BYTES).isascii():
        raise CorruptShardError(f"{file_name}: the record {_IDENTITY!r} is not text")
    return records.read("data.pkl", _PICKLE_LIMIT_BYTES)


def _plain_tensors(records: ZipRecords, pickle: bytes, file_name: str) -> list[StoredTensor] | None:
    """The tensors of a plain state dict; None for an archive that torch must read."""
    try:
        tensors = read_state_dict(pickle)
    except NotAStateDictError:
        return None
    stored = []
    for name, tensor in tensors.items():
        record = records.by_name.get(f"{_STORAGES}{tensor.storage}")
        if record is None or tensor.dtype not in DTYPES or not (tensor.is_row_major or tensor.is_column_major):
            return None
        spec = TensorSpec(name, DTYPES[tensor.dtype], tensor.shape)
        _require_whole(name, record, tensor.storage_bytes, file_name)
        begin = tensor.offset * (DTYPE_BITS[spec.dtype] // 8)
        if begin + spec.nbytes > record.size_bytes:
            return None
        stored.append(StoredTensor(spec, record.offset_bytes + begin, not tensor.is_row_major))
    return stored


def _require_whole(name: str, record: ZipRecord, storage_bytes: int, file_name: str) -> None:
    """Raise CorruptShardError for a storage that is not as large as the pickle has it, which torch refuses too."""
    if record.size_bytes != storage_bytes:
        raise CorruptShardError(
            f"{file_name}: the storage of tensor {name!r} has {record.size_bytes:,} bytes, its pickle says "
            f"{storage_bytes:,}",
            hint=GET_IT_AGAIN,
        )


def _check_bounds(file: BinaryIO | BoundedReader, file_name: str) -> None:
    """Raise UnsafePickleError for a pickle that could crash torch's unpickler, CorruptShardError for a damaged one."""
    try:
        check_pickle(file)
    except PickleBoundsError as error:
        raise UnsafePickleError(
            f"{file_name}: its pickle is not that of a list of tensors: {error}; it is not unpickled",
            hint=RESAVE_HINT,
        ) from error
    except ValueError as error:
        raise CorruptShardError(f"{file_name}: its pickle cannot be read: {error!s:.200}", hint=GET_IT_AGAIN) from error


def _without_data() -> AbstractContextManager[object]:
    """A context in which loading to the meta device marks each storage with its offset and reads no data.

    torch does so by itself from 2.11 on (https://github.com/pytorch/pytorch/pull/170619). Earlier versions, from 2.7
    on, need FakeTensorMode, which costs 70 MB and more than a second.
    """
    import torch

    if torch.__version__ >= "2.11":  # a TorchVersion, which compares as a version
        return nullcontext()
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _skeleton(records: ZipRecords, pickle: bytes) -> tuple[BinaryIO, dict[int, ZipRecord]]:
    """A copy of the archive with empty storages, and the real record for each offset in the copy.

    torch sets `_checkpoint_offset` on storages that it loads without data, but computes it from the order in which its
    own writer would have written them, which is wrong for files that another tool packed. Here it is only an identity.
    """
    skeleton = io.BytesIO()
    storages = {}
    with zipfile.ZipFile(skeleton, "w") as writer:
        writer.writestr("archive/data.pkl", pickle)
        writer.writestr("archive/version", b"3")
        writer.writestr("archive/byteorder", b"little")
        for name, record in records.by_name.items():
            if name.startswith(_STORAGES):
                writer.writestr(f"archive/{name}", b"")
                storages[writer.fp.tell()] = record  # type: ignore[union-attr]
    skeleton.seek(0)
    return skeleton, storages


def _check_legacy_pickles(file: BinaryIO, file_name: str) -> None:
    """Check the bounds of a legacy file's pickles: a number, a version, the platform, the tensors, their storages."""
    file.seek(0)
    reader = BoundedReader(file, _PICKLE_LIMIT_BYTES)
    for _ in range(_LEGACY_PICKLES):
        _check_bounds(reader, file_name)
    file.seek(0)


def _read_legacy(file: BinaryIO, file_name: str, file_bytes: int) -> ShardContents:
    """Shapes and dtypes of a legacy file. Its pickles come first and end where the data begins."""
    from torch.serialization import skip_data

    _check_legacy_pickles(file, file_name)
    # Storages are allocated but never written: address space, not memory, and less than load_legacy will need.
    with skip_data():
        tensors = named_tensors(load_weights(file, file_name, "cpu"), file_name)
    specs = {name: spec_of(name, tensor, file_name) for name, tensor in tensors.items()}
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    # Each storage is written as its length, 8 bytes, and its data.
    end = file.tell() + sum(8 + storage_bytes for storage_bytes in storages.values())
    if end > file_bytes:
        raise CorruptShardError(
            f"{file_name}: its tensors end at byte {end:,}, the file has {file_bytes:,}", hint=GET_IT_AGAIN
        )
    stored, offset = [], 0
    for spec in specs.values():
        stored.append(StoredTensor(spec, offset))
        offset += spec.nbytes
    return ShardContents(file_name, tuple(stored), {}, file_bytes, mappable=False)


def _stored_tensor(spec: TensorSpec, tensor: "Tensor", begin: int, record_bytes: int, file_name: str) -> StoredTensor:
    """The place of a tensor in the file, given its record's. The tensor may be a view into its storage."""
    column_major = not tensor.is_contiguous()
    if column_major and not (tensor.dim() == 2 and tensor.t().is_contiguous()):
        raise CheckpointError(
            f"{file_name}: tensor {spec.name!r} of shape {spec.shape} is stored with the strides {tensor.stride()}, "
            "a view that skips or repeats bytes",
            hint="Save it again with .contiguous().",
        )
    offset = int(tensor.storage_offset()) * tensor.element_size()
    if offset + spec.nbytes > record_bytes:
        raise CorruptShardError(
            f"{file_name}: tensor {spec.name!r} uses the bytes {offset:,} to {offset + spec.nbytes:,} of a storage "
            f"that has {record_bytes:,}",
            hint=GET_IT_AGAIN,
        )
    return StoredTensor(spec, begin + offset, column_major)


def _in_file_order(stored: list[StoredTensor]) -> tuple[StoredTensor, ...]:
    return tuple(sorted(stored, key=lambda tensor: (tensor.offset_bytes, tensor.end_bytes, tensor.spec.name)))
