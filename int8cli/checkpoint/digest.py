"""Digests of files and tensors. The digest of a shard is computed in the pass that converts it.

Owns which digests there are.
"""

import hashlib
import os
from pathlib import Path

import xxhash

from int8cli.checkpoint.reader import ShardReader, open_to_read
from int8cli.checkpoint.source import LocalFile
from int8cli.errors import DigestMismatchError

NOT_AS_PUBLISHED = "its sha256 differs from the one on the Hub"
_GAP_BYTES = 1 << 20


class SourceDigest:
    """The sha256 of a whole source file, from blocks in file order that may leave gaps or overlap.

    The gaps (headers, zip framing, tensors read in another order) are read here. Bytes that were passed before, as with
    tensors that share storage, do not count twice.
    """

    def __init__(self, reader: ShardReader, file_bytes: int) -> None:
        self._reader = reader
        self._file_bytes = file_bytes
        self._position = 0
        self._sha256 = hashlib.sha256()

    def update(self, offset_bytes: int, block: memoryview) -> None:
        self._read_up_to(offset_bytes)
        new = block[self._position - offset_bytes :]
        self._sha256.update(new)
        self._position += len(new)

    def hexdigest(self) -> str:
        """The digest of the whole file. Reads the rest of it."""
        self._read_up_to(self._file_bytes)
        return self._sha256.hexdigest()

    def _read_up_to(self, offset_bytes: int) -> None:
        while self._position < offset_bytes:
            gap = memoryview(bytearray(min(_GAP_BYTES, offset_bytes - self._position)))
            self._reader.read_into(self._position, gap)
            self._sha256.update(gap)
            self._position += len(gap)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    sha256 = hashlib.sha256()
    piece = memoryview(bytearray(_GAP_BYTES))
    with open_to_read(path) as file:
        while count := file.readinto(piece):  # type: ignore[attr-defined]  # a BufferedReader has it
            sha256.update(piece[:count])
    return sha256.hexdigest()


def git_sha1(data: bytes) -> str:
    """The sha1 that git gives a blob of these bytes, in hex. It does not protect against chosen bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def git_sha1_of(path: Path) -> str:
    """The sha1 that git gives a blob of a file's bytes, in hex."""
    with open_to_read(path) as file:
        sha1 = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
        while piece := file.read(_GAP_BYTES):
            sha1.update(piece)
    return sha1.hexdigest()


def require_published(file_name: str, local: LocalFile, sha256: str | None) -> None:
    """Raise DigestMismatchError if the Hub published a sha256 for a file, and `sha256`, in hex, is a different one."""
    if local.sha256 is not None and sha256 != local.sha256:
        raise DigestMismatchError(
            f"{file_name}: {NOT_AS_PUBLISHED} ({local.sha256})",
            hint="Run the same command again. If the error returns, the network or this disk corrupts data.",
        )


def new_digest() -> "xxhash.xxh3_128":
    """A new digest of the kind that records store for each written tensor: xxh3_128 of its bytes, in hex."""
    return xxhash.xxh3_128()
