"""Digests of what is read and written, taken in the pass itself.

Owns the order: blocks are worked on by several threads, while a digest must see its bytes one after the other.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from int8cli.checkpoint.reader import ShardReader

_GAP_BYTES = 1 << 20


class TurnAbandonedError(Exception):
    """Another thread failed; there will be no more turns."""


class Turnstile:
    """Lets threads through one at a time in the order of their tickets 0, 1, 2, …"""

    def __init__(self) -> None:
        self._next = 0
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, ticket: int) -> Iterator[None]:
        """Wait for every earlier ticket. Raises TurnAbandonedError once `close` was called."""
        with self._changed:
            self._changed.wait_for(lambda: self._next == ticket or self._closed)
            if self._closed:
                raise TurnAbandonedError
        yield
        with self._changed:
            self._next += 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class SourceDigest:
    """The sha256 of a whole source file, from blocks that come in file order but leave gaps and may overlap.

    What lies between blocks (headers, zip framing, tensors read in another order) is read here; bytes that have been
    seen, as in tensors that share storage, are not counted twice.
    """

    def __init__(self, reader: ShardReader, file_bytes: int) -> None:
        self._reader = reader
        self._file_bytes = file_bytes
        self._position = 0
        self._sha256 = hashlib.sha256()

    def update(self, offset_bytes: int, block: memoryview) -> None:
        self._read_up_to(offset_bytes)
        fresh = block[self._position - offset_bytes :]
        self._sha256.update(fresh)
        self._position += len(fresh)

    def hexdigest(self) -> str:
        """The digest of the file, its end included."""
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
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            sha256.update(piece[:count])
    return sha256.hexdigest()


def new_digest() -> "xxhash.xxh3_128":
    """The digest that records hold for each tensor written: xxh3_128 of its bytes, in hex."""
    return xxhash.xxh3_128()
