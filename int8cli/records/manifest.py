"""`int8/files.json`: what a finished conversion holds beside its shards, with digests.

Owns its schema. It is written when everything but config.json stands, so that a directory without it is unfinished.
The model card is not in it: a card is there to be edited.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from int8cli.checkpoint.digest import new_digest
from int8cli.checkpoint.reader import FileReader
from int8cli.checkpoint.writer import write_file
from int8cli.errors import OutputError

MANIFEST_FILE = "int8/files.json"
MANIFEST_SCHEMA = "int8cli.files/1"
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file as it was put down, by its name in the output directory."""

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
        """Read a file in pieces. Raises OSError, SourceError, CorruptShardError."""
        digest, size_bytes = new_digest(), path.stat().st_size
        buffer = memoryview(bytearray(_PIECE_BYTES))
        reader = FileReader(path)
        try:
            for start in range(0, size_bytes, _PIECE_BYTES):
                piece = buffer[: min(_PIECE_BYTES, size_bytes - start)]
                reader.read_into(start, piece)
                digest.update(piece)
        finally:
            reader.close()
        return cls(name, size_bytes, digest.hexdigest())


def write_manifest(output: Path, on_disk: Iterable[str], in_memory: Mapping[str, bytes]) -> None:
    """Put down the digests of files that stand in `output`, and of those that will be written last."""
    files = [SideFile.of_path(name, output / name) for name in on_disk]
    files += [SideFile.of_bytes(name, data) for name, data in in_memory.items()]
    document = {"schema": MANIFEST_SCHEMA, "files": [asdict(file) for file in sorted(files, key=lambda f: f.file)]}
    write_file(output / MANIFEST_FILE, (json.dumps(document, indent=1) + "\n").encode())


def read_manifest(output: Path) -> tuple[SideFile, ...] | None:
    """What `write_manifest` put down; None where it did not come to that. Raises OutputError for anything else."""
    try:
        document: Any = json.loads((output / MANIFEST_FILE).read_bytes())
        return tuple(SideFile(str(f["file"]), int(f["size_bytes"]), str(f["xxh3_128"])) for f in document["files"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"{output / MANIFEST_FILE} cannot be read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise OutputError(f"{output / MANIFEST_FILE} is not as int8cli wrote it ({type(error).__name__})") from error
