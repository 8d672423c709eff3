"""`int8/files.json`: the files of a finished conversion other than its shards, with digests.

Owns its schema. It is written after everything but config.json, so a directory without it is unfinished. The model card
is not in it, since users edit it.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from int8cli.checkpoint.digest import new_digest
from int8cli.checkpoint.output_names import OWN_DIRECTORY
from int8cli.checkpoint.reader import FileReader
from int8cli.checkpoint.writer import write_file
from int8cli.records.documents import check_file_name, read_document, without_schema
from int8cli.typed_json import read_as

MANIFEST_FILE = f"{OWN_DIRECTORY}/files.json"
MANIFEST_SCHEMA = "int8cli.files/1"
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file as it was written, by its name in the output directory."""

    file: str
    size_bytes: int
    xxh3_128: str

    @classmethod
    def of_bytes(cls, name: str, data: bytes) -> "SideFile":
        digest = new_digest()
        digest.update(data)
        return cls(name, len(data), digest.hexdigest())

    @classmethod
    def of_path(cls, name: str, path: Path) -> "SideFile":
        """Read a file in pieces. Raises SourceError, CorruptShardError."""
        buffer = memoryview(bytearray(_PIECE_BYTES))
        digest = new_digest()
        with closing(FileReader(path)) as reader:
            size_bytes = reader.size_bytes
            for start in range(0, size_bytes, _PIECE_BYTES):
                piece = buffer[: min(_PIECE_BYTES, size_bytes - start)]
                reader.read_into(start, piece)
                digest.update(piece)
        return cls(name, size_bytes, digest.hexdigest())

    def is_at(self, path: Path) -> bool:
        """Whether a file has these bytes. One of another size is not read. Raises SourceError, CorruptShardError."""
        with closing(FileReader(path)) as reader:
            is_as_large = reader.size_bytes == self.size_bytes
        return is_as_large and SideFile.of_path(self.file, path) == self


@dataclass(frozen=True, slots=True)
class _ManifestFields:
    files: tuple[SideFile, ...]


def write_manifest(
    output: Path, on_disk: Iterable[str], in_memory: Mapping[str, bytes], *, aside: Path | None = None
) -> None:
    """Write the digests of files that are in `output`, and of those in memory that will be written after this.

    `aside` as in `write_file`.
    """
    files = [SideFile.of_path(name, output / name) for name in on_disk]
    files += [SideFile.of_bytes(name, data) for name, data in in_memory.items()]
    document = {"schema": MANIFEST_SCHEMA, "files": [asdict(file) for file in sorted(files, key=lambda f: f.file)]}
    write_file(output / MANIFEST_FILE, (json.dumps(document, indent=1) + "\n").encode(), below=output, aside=aside)


def read_manifest(output: Path) -> tuple[SideFile, ...] | None:
    """The manifest; None if there is none. Raises OutputError if it is damaged."""
    return read_document(output / MANIFEST_FILE, _from_json, "Run the same convert command again to rewrite it.")


def _from_json(document: Any) -> tuple[SideFile, ...]:
    found = read_as(_ManifestFields, without_schema(document, MANIFEST_SCHEMA))
    for index, file in enumerate(found.files):
        check_file_name(file.file, f"files[{index}].file")
    return found.files
