"""The records of what a repository has: `int8/uploads/<shard>.json` for one shard, `int8/push.json` for the commit.

Owns the schemas of these files. Reads and writes nothing. They stay on this machine: no repository gets them.
"""

from dataclasses import asdict, dataclass
from typing import Any

from int8cli.records.documents import check_file_name, without_schema
from int8cli.typed_json import InvalidJsonError, read_as

UPLOAD_SCHEMA = "int8cli.upload/1"
COMMIT_SCHEMA = "int8cli.commit/1"
_SHA256_DIGITS = 64


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A file whose bytes were uploaded. `sha256` in hex. `mark` is what an object store says of it, its ETag mostly."""

    file: str
    size_bytes: int
    sha256: str
    mark: str = ""


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """The files of one shard that `repository`, a Hub id or an address, has. They may be in no commit yet."""

    repository: str
    files: tuple[UploadedFile, ...]

    def to_json(self) -> dict[str, Any]:
        return {"schema": UPLOAD_SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, document: Any) -> "UploadRecord":
        """Raises InvalidJsonError for values or file names that no such record has."""
        found = read_as(cls, without_schema(document, UPLOAD_SCHEMA))
        for index, file in enumerate(found.files):
            check_file_name(file.file, f"files[{index}].file")
            if len(file.sha256) != _SHA256_DIGITS or not set(file.sha256) <= set("0123456789abcdef"):
                raise InvalidJsonError("is not a sha256", f"files[{index}].sha256")
        if len({file.file for file in found.files}) != len(found.files):
            raise InvalidJsonError("names a file twice", "files")
        return found


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """The last commit that named all files of a conversion, on a branch of `repository`, a Hub id or an address."""

    repository: str
    revision: str
    commit: str

    def to_json(self) -> dict[str, Any]:
        return {"schema": COMMIT_SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, document: Any) -> "CommitRecord":
        """Raises InvalidJsonError for values that no such record has."""
        return read_as(cls, without_schema(document, COMMIT_SCHEMA))
