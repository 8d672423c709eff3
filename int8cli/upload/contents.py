"""The files of a conversion as a repository gets them, with the digests that it knows them by.

Owns which files these are, and the check that their bytes are those that were recorded. Makes no request.
"""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from int8cli.checkpoint.digest import git_sha1_of, new_digest, sha256_of
from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.disk import reading_errors
from int8cli.checkpoint.file_state import FileState
from int8cli.checkpoint.hub.push_file import PushFile
from int8cli.checkpoint.output_names import CONVERSION_FILE
from int8cli.checkpoint.reader import FileReader
from int8cli.conversion.side_files import complete_manifest
from int8cli.errors import CorruptShardError, ModelNotFoundError, OutputError
from int8cli.planning.output_files import CARD_FILE
from int8cli.records.conversion import Conversion
from int8cli.records.manifest import MANIFEST_FILE, SideFile
from int8cli.records.shard_record import FileRecord
from int8cli.records.store import RecordStore
from int8cli.records.upload_record import UploadRecord

_PIECE_BYTES = 1 << 20
_REWRITE = "Run the same convert command again to rewrite it."
_AGAIN = "Delete the file, and run the same convert command again: it converts that shard again."


def shard_file(directory: Path, record: FileRecord) -> PushFile:
    """A shard or a sidecar. Reads it once, and compares header and tensors with the record.

    Raises CorruptShardError if they differ.
    """
    path = directory / record.file
    sha256 = hashlib.sha256()
    with closing(FileReader(path)) as reader:
        if reader.size_bytes != record.size_bytes:
            raise CorruptShardError(
                f"{record.file} has {reader.size_bytes:,} bytes; {record.size_bytes:,} were written", hint=_AGAIN
            )
        start = 0
        for what, size_bytes, xxh3_128 in _parts(record):
            digest = new_digest()
            for piece in _pieces(reader, start, size_bytes):
                sha256.update(piece)
                digest.update(piece)
            if digest.hexdigest() != xxh3_128:
                raise CorruptShardError(f"{record.file}: {what} differs from what was written", hint=_AGAIN)
            start += size_bytes
        state = reader.state
    return PushFile(record.file, record.size_bytes, sha256.hexdigest(), path=path, state=state)


def uploaded_files(upload: UploadRecord) -> Iterator[PushFile]:
    """The files of a shard that were uploaded before, wherever they are now."""
    for file in upload.files:
        yield PushFile(file.file, file.size_bytes, file.sha256, mark=file.mark)


def side_files(directory: Path, conversion: Conversion, store: RecordStore) -> list[PushFile]:
    """All files of a finished conversion but its shards and sidecars: descriptions, records, and what was copied.

    Raises OutputError for one that is missing or differs from what was written, and SourceError for a link to a file
    outside the directory. The model card may differ: users edit it.
    """
    manifest = complete_manifest(directory, conversion)
    names = [CARD_FILE, MANIFEST_FILE, *store.record_files(conversion)]
    files = [_side_file(directory, name) for name in names]
    return [*files, *(_recorded(directory, file) for file in manifest)]


def conversion_file(directory: Path) -> PushFile:
    """The description of the conversion. Raises CorruptShardError, SourceError if it cannot be read."""
    return _side_file(directory, CONVERSION_FILE)


def all_names(conversion: Conversion, store: RecordStore) -> tuple[str, ...]:
    """The names of every file that a conversion may put into a repository."""
    return (*conversion.files, *store.record_files(conversion))


def _recorded(directory: Path, file: SideFile) -> PushFile:
    if not file.is_at(_path(directory, file.file)):
        raise OutputError(f"{file.file} differs from what was written", hint=_REWRITE)
    return _side_file(directory, file.file)


def _side_file(directory: Path, name: str) -> PushFile:
    path = _path(directory, name)
    with reading_errors(path, name):
        state = FileState.of(path.stat())
    return PushFile(name, state.size_bytes, sha256_of(path), git_sha1_of(path), path, state=state)


def _path(directory: Path, name: str) -> Path:
    """Where a file is. Raises OutputError if it is missing, SourceError for a link to a file outside the directory."""
    try:
        DirectorySource(directory).size_bytes(name)
    except ModelNotFoundError as error:
        raise OutputError(f"{name} is missing", hint=_REWRITE) from error
    return directory / name


def _parts(record: FileRecord) -> Iterator[tuple[str, int, str]]:
    """What, size and digest of the header and of each tensor, in file order."""
    yield "its header", record.header_bytes, record.header_xxh3_128
    for tensor in record.tensors:
        yield tensor.name, tensor.size_bytes, tensor.xxh3_128


def _pieces(reader: FileReader, start: int, size_bytes: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_PIECE_BYTES, max(size_bytes, 0))))
    for offset in range(start, start + size_bytes, _PIECE_BYTES):
        piece = buffer[: min(_PIECE_BYTES, start + size_bytes - offset)]
        reader.read_into(offset, piece)
        yield piece
