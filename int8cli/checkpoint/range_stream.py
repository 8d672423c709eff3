"""A file that is read by ranges, as a seekable stream. Owns its position. Knows no protocol."""

import errno
import io
import os
from abc import abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class RangeStream(io.RawIOBase):
    """Each read is one request for exactly that range. For read-ahead, wrap it in a BufferedReader.

    `size_bytes` is that of the file. If it is None, it is asked for once a read or a seek needs it: a first read from
    the start does not, and may tell it (`_size_bytes`).
    """

    def __init__(self, size_bytes: int | None = None) -> None:
        self._size_bytes = size_bytes
        self._position = 0

    @abstractmethod
    def _read_range(self, start: int, length: int) -> bytes | bytearray:
        """The bytes from `start` on; fewer at the end of the file."""

    def _ask_size(self) -> int:
        """The size of the file, where it was not known."""
        raise io.UnsupportedOperation("the size is not known")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            offset += self._end()
        if offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = offset
        return offset

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        length = len(view)
        if length and (self._position or self._size_bytes is not None):
            length = max(0, min(length, self._end() - self._position))
        if not length:
            return 0
        data = self._read_range(self._position, length)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        return self.read(max(0, self._end() - self._position)) or b""  # one request; the default reads in 8 KiB

    def _end(self) -> int:
        if self._size_bytes is None:
            self._size_bytes = self._ask_size()
        return self._size_bytes
