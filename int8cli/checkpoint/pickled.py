"""PyTorch's own files (`.bin`, `.pt`, `.pth`): where their tensors lie, without reading them.

Owns the two layouts that `torch.save` has had: a zip archive, whose records can be mapped, and the pickles in a row
that came before it, which cannot. Nothing is unpickled but tensors. The form that nearly all archives have is read by
`state_dict_pickle`, without torch. What that does not know, `torch.load(weights_only=True)` reads or refuses, on a copy
of the archive that has every storage emptied, so that it sees no data and no file that could be swapped under it.
"""

import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, BinaryIO

from int8cli.checkpoint.header import refuse_stand_in
from int8cli.checkpoint.state_dict_pickle import NotAStateDictError, read_state_dict
from int8cli.checkpoint.tensor import DTYPE_BITS, ShardContents, StoredTensor, TensorSpec
from int8cli.errors import CheckpointError, CorruptShardError, UnsafePickleError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

# https://docs.pytorch.org/docs/stable/notes/serialization.html#torch-save-format-for-torch-save
_ZIP_MAGIC = b"PK\x03\x04"
# The old format opens with MAGIC_NUMBER, itself pickled under protocol 2.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_PICKLE_MAGIC = b"\x80"
_PICKLE_LIMIT_BYTES = 100_000_000
_LOCAL_HEADER_BYTES = 30  # PKWARE APPNOTE, 4.3.7: then the name, whose length is at 26, and padding, its length at 28
_UTF8_NAMES = 0x800  # APPNOTE, 4.4.4, bit 11
_RETRY_HINT = "The download may be incomplete: run the same command again."
_RESAVE_HINT = "Load it where it was made and save only its state_dict(), preferably with save_pretrained()."

_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}


def read_pickled(file: BinaryIO, file_name: str, file_bytes: int) -> ShardContents:
    """Read what a PyTorch file of `file_bytes` bytes holds, touching its directory and its pickle but no weights.

    Tied tensors appear under each of their names, at one offset. A legacy file gives `mappable=False`. Raises
    CorruptShardError for a file that is not whole, UnsafePickleError for one with anything but named tensors,
    CheckpointError for a tensor that safetensors cannot express, UnsupportedModelError for TorchScript.
    """
    file.seek(0)
    head = file.read(64)
    refuse_stand_in(head, file_name)
    if head.startswith(_ZIP_MAGIC):
        return _read_zip(file, file_name, file_bytes)
    if head.startswith(_LEGACY_MAGIC):
        return _read_legacy(file, file_name, file_bytes)
    if head.startswith(_PICKLE_MAGIC):
        raise UnsafePickleError(
            f"{file_name} is a bare Python pickle, not a file of torch.save; it is not unpickled", hint=_RESAVE_HINT
        )
    raise CorruptShardError(f"{file_name}: its {file_bytes:,} bytes do not begin like a PyTorch file")


def load_legacy(path: Path) -> dict[str, "Tensor"]:
    """Load the tensors of a legacy file, whole and into memory: its data cannot be reached in any other way.

    Raises what `read_pickled` raises.
    """
    with path.open("rb") as file:
        return _named_tensors(_load_weights(file, path.name, "cpu"), path.name)


def _read_zip(file: BinaryIO, file_name: str, file_bytes: int) -> ShardContents:
    with _zip_faults(file_name):
        archive = zipfile.ZipFile(file)
    records = _records(archive, file_name)
    plain = _plain_tensors(archive, records, file, file_name, file_bytes)
    if plain is not None:
        return ShardContents(file_name, _in_file_order(plain), {}, file_bytes)
    skeleton, storages = _skeleton(archive, records, file_name)
    with _without_data():
        tensors = _named_tensors(_load_weights(skeleton, file_name, "meta"), file_name)
    places = _places(file, storages, file_name, file_bytes)
    stored = []
    for name, tensor in tensors.items():
        spec = _spec(name, tensor, file_name)
        # The offset is that of an emptied record in the skeleton, and so the storage's name.
        record = storages.get(getattr(tensor.untyped_storage(), "_checkpoint_offset", None) or 0)
        if record is None:
            raise CheckpointError(f"{file_name}: tensor {name!r} was saved without its data")
        stored.append(_stored_tensor(spec, tensor, places[record.filename], record.file_size, file_name))
    return ShardContents(file_name, _in_file_order(stored), {}, file_bytes)


def _plain_tensors(
    archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo], file: BinaryIO, file_name: str, file_bytes: int
) -> list[StoredTensor] | None:
    """The tensors of a plain state dict; None for an archive that torch has to judge."""
    with _zip_faults(file_name):
        pickle = archive.read(records["data.pkl"])
        byteorder = archive.read(records["byteorder"]) if "byteorder" in records else b"little"
    try:
        tensors = read_state_dict(pickle)
    except NotAStateDictError:
        return None
    if byteorder != b"little":
        return None
    storages = {name: info for name, info in records.items() if name.startswith("data/")}
    places = _places(file, dict(enumerate(storages.values())), file_name, file_bytes)
    stored = []
    for name, tensor in tensors.items():
        record = storages.get(f"data/{tensor.storage}")
        if record is None or tensor.dtype not in _DTYPES or not (tensor.is_row_major or tensor.is_column_major):
            return None
        spec = TensorSpec(name, _DTYPES[tensor.dtype], tensor.shape)
        begin = tensor.offset * (DTYPE_BITS[spec.dtype] // 8)
        if begin + spec.nbytes > record.file_size:
            return None
        stored.append(StoredTensor(spec, places[record.filename] + begin, not tensor.is_row_major))
    return stored


def _without_data() -> AbstractContextManager[object]:
    """Where loading to the meta device marks each storage with its offset and reads none.

    Later versions of torch need nothing for it (https://github.com/pytorch/pytorch/pull/170619); those from 2.7 on need
    their FakeTensorMode, which costs 70 MB and more than a second.
    """
    import torch

    if torch.__version__ >= "2.11":  # a TorchVersion, which compares as a version and not as text
        return nullcontext()
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@contextmanager
def _zip_faults(file_name: str) -> Iterator[None]:
    """Around calls of zipfile alone: what that raises for an archive that is not whole, it raises from many places."""
    try:
        yield
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        raise CorruptShardError(f"{file_name}: not a complete zip archive: {error!s:.200}", hint=_RETRY_HINT) from error


def _records(archive: zipfile.ZipFile, file_name: str) -> dict[str, zipfile.ZipInfo]:
    """The archive's records by name, without the directory that they share. All stored, none twice."""
    if any(name.endswith("/constants.pkl") for name in archive.namelist()):
        raise UnsupportedModelError(
            f"{file_name} is a TorchScript program, not a checkpoint",
            hint="Load it where it was made and save its state_dict() with torch.save.",
        )
    records: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if name in records:
            raise CorruptShardError(f"{file_name}: the record {name!r} appears twice")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise CorruptShardError(
                f"{file_name}: the record {name!r} is compressed or encrypted, which torch.save never does",
                hint="Unpack the archive and pack it again without compression, or save the model again.",
            )
        records[name] = info
        if info.header_offset < 0:
            raise CorruptShardError(f"{file_name}: the record {name!r} begins before the file", hint=_RETRY_HINT)
    if "data.pkl" not in records:
        raise CorruptShardError(f"{file_name} is a zip archive, but not one of torch.save: it has no data.pkl")
    if records["data.pkl"].file_size > _PICKLE_LIMIT_BYTES:
        raise CorruptShardError(
            f"{file_name}: data.pkl has {records['data.pkl'].file_size:,} bytes, too large for a list of tensors"
        )
    return records


def _skeleton(
    archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo], file_name: str
) -> tuple[BinaryIO, dict[int, zipfile.ZipInfo]]:
    """The archive with each storage emptied, and the real record behind each of its offsets.

    torch puts `_checkpoint_offset` on what it loads without data, but computes it from the order in which its own
    writer would have written; a file that another tool packed breaks that. Here it is only an identity.
    """
    with _zip_faults(file_name):
        pickle = archive.read(records["data.pkl"])
        byteorder = archive.read(records["byteorder"]) if "byteorder" in records else b"little"
    if byteorder != b"little":
        raise CheckpointError(
            f"{file_name} was saved on a machine whose byte order is {byteorder!r:.20}, not little-endian",
            hint="Load it with torch.load and save it again on a little-endian machine.",
        )
    skeleton = io.BytesIO()
    storages = {}
    with zipfile.ZipFile(skeleton, "w") as writer:
        writer.writestr("archive/data.pkl", pickle)
        writer.writestr("archive/version", b"3")
        writer.writestr("archive/byteorder", b"little")
        for name, info in records.items():
            if name.startswith("data/"):
                writer.writestr(f"archive/{name}", b"")
                storages[writer.fp.tell()] = info  # type: ignore[union-attr]
    skeleton.seek(0)
    return skeleton, storages


def _places(file: BinaryIO, storages: Mapping[int, zipfile.ZipInfo], file_name: str, file_bytes: int) -> dict[str, int]:
    """Where the bytes of each record begin. The directory at the end leaves out how long the local header is."""
    places = {}
    end, before = 0, ""
    for info in sorted(storages.values(), key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise CorruptShardError(f"{file_name}: the record {info.filename!r} overlaps {before!r}")
        begin = info.header_offset + _local_header_bytes(file, info, file_name)
        end, before = begin + info.file_size, info.filename
        if end > file_bytes:
            raise CorruptShardError(
                f"{file_name}: the record {info.filename!r} ends at byte {end:,}, the file has {file_bytes:,}",
                hint=_RETRY_HINT,
            )
        places[info.filename] = begin
    return places


def _local_header_bytes(file: BinaryIO, info: zipfile.ZipInfo, file_name: str) -> int:
    """The length of the header in front of a record's data. Raises CorruptShardError if it does not stand there."""
    name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8_NAMES else "cp437")
    file.seek(info.header_offset)
    local = file.read(_LOCAL_HEADER_BYTES + len(name))
    if not local.startswith(_ZIP_MAGIC) or local[26:28] + local[30:] != len(name).to_bytes(2, "little") + name:
        raise CorruptShardError(
            f"{file_name}: the record {info.filename!r} does not begin at byte {info.header_offset:,}, as the "
            "archive's directory says",
            hint=_RETRY_HINT,
        )
    return len(local) + int.from_bytes(local[28:30], "little")


def _read_legacy(file: BinaryIO, file_name: str, file_bytes: int) -> ShardContents:
    """Shapes and dtypes of a legacy file, whose pickles stand before its data and end where that begins."""
    from torch.serialization import skip_data

    file.seek(0)
    # Storages are allocated but never touched: address space, not memory, and less than load_legacy is going to need.
    with skip_data():
        tensors = _named_tensors(_load_weights(file, file_name, "cpu"), file_name)
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    # Each storage is written as its length, 8 bytes, and its data.
    end = file.tell() + sum(8 + storage_bytes for storage_bytes in storages.values())
    if end > file_bytes:
        raise CorruptShardError(
            f"{file_name}: its tensors end at byte {end:,}, the file has {file_bytes:,}", hint=_RETRY_HINT
        )
    stored, offset = [], 0
    for name, tensor in tensors.items():
        spec = _spec(name, tensor, file_name)
        stored.append(StoredTensor(spec, offset))
        offset += spec.nbytes
    return ShardContents(file_name, tuple(stored), {}, file_bytes, mappable=False)


def _load_weights(file: BinaryIO, file_name: str, device: str) -> Any:
    """torch.load of tensors alone, its failures told apart: forbidden content, or a broken file."""
    import torch

    try:
        return torch.load(file, weights_only=True, map_location=device, mmap=False)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{file_name} contains tensors that cannot be described without their data, such as quantized ones",
            hint="Save it again with dense tensors of an ordinary dtype.",
        ) from error
    except UnpicklingError as error:
        found = ", ".join(_forbidden_globals(file))
        raise UnsafePickleError(
            f"{file_name} holds {found or 'something other than tensors, or is damaged'}; it is not unpickled",
            hint=_RESAVE_HINT,
        ) from error
    # What a damaged pickle makes the unpickler and the functions that it may call raise is not for us to list.
    except Exception as error:
        raise CorruptShardError(
            f"{file_name}: its pickle cannot be read: {type(error).__name__}: {str(error)[:200]}", hint=_RETRY_HINT
        ) from error


def _forbidden_globals(file: BinaryIO) -> list[str]:
    """The names that a zip file's pickle would import beyond those of tensors, read off without running it."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    file.seek(0)
    try:
        return sorted(get_unsafe_globals_in_checkpoint(file))
    except Exception:  # a pickle bad enough to fail here has been refused already; only its explanation is lost
        return []


def _named_tensors(loaded: Any, file_name: str) -> dict[str, "Tensor"]:
    """A state dict and nothing else: what is no plain tensor under a plain name is refused."""
    import torch

    if not isinstance(loaded, dict):
        raise UnsafePickleError(
            f"{file_name} contains one object of type {type(loaded).__name__}, not tensors by name", hint=_RESAVE_HINT
        )
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise UnsafePickleError(f"{file_name} has an entry named {str(name)[:80]}, of type {type(name).__name__}")
        if not isinstance(value, torch.Tensor):
            raise UnsafePickleError(
                f"{file_name} contains more than tensors: {name!r} is of type {type(value).__name__}", hint=_RESAVE_HINT
            )
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise CorruptShardError(f"{file_name}: the name {name!r} is not text")
    return dict(loaded)


def _spec(name: str, tensor: "Tensor", file_name: str) -> TensorSpec:
    """What safetensors would call the tensor. Raises CheckpointError where it has no word for it."""
    import torch

    layout = str(tensor.layout).removeprefix("torch.")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise CheckpointError(f"{file_name}: tensor {name!r} is {layout}, and safetensors supports only dense tensors")
    if tensor.is_quantized or dtype not in _DTYPES:
        raise CheckpointError(f"{file_name}: tensor {name!r} has the dtype {dtype}, which safetensors does not support")
    if tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(f"{file_name}: tensor {name!r} is stored as the conjugate or negative of its values")
    return TensorSpec(name, _DTYPES[dtype], tuple(tensor.shape))


def _stored_tensor(spec: TensorSpec, tensor: "Tensor", begin: int, record_bytes: int, file_name: str) -> StoredTensor:
    """A tensor's place, from that of its record; the tensor may be a view into it."""
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
            f"{file_name}: tensor {spec.name!r} takes the bytes {offset:,} to {offset + spec.nbytes:,} of a "
            f"storage that has {record_bytes:,}",
            hint=_RETRY_HINT,
        )
    return StoredTensor(spec, begin + offset, column_major)


def _in_file_order(stored: list[StoredTensor]) -> tuple[StoredTensor, ...]:
    return tuple(sorted(stored, key=lambda tensor: (tensor.offset_bytes, tensor.end_bytes, tensor.spec.name)))
