"""Compares the bytes that a pass would write with a file that exists.

Takes the place of a writer: knows the file's planned header and tensors, not how their bytes are made.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from int8cli.checkpoint.reader import FileReader
from int8cli.checkpoint.tensor import DTYPE_BITS, StoredTensor
from int8cli.planning.output_files import OutputShard
from int8cli.results.verification import Failure


class Comparison:
    """Compares the bytes that a pass writes with an existing file. Safe to call from several threads."""

    def __init__(self, path: Path, output: OutputShard) -> None:
        self._reader = FileReader(path)
        self._file = output.file_name
        self._header_bytes = len(output.header)
        self._places = sorted(output.tensors.values(), key=lambda place: (place.offset_bytes, place.end_bytes))
        self._starts = [place.offset_bytes for place in self._places]
        self._buffers = threading.local()
        self._first: dict[str | None, int] = {}
        self._lock = threading.Lock()

    def write_at(self, offset_bytes: int, data: memoryview | bytes) -> None:
        """Compare bytes of the file. Raises CorruptShardError if the file is too short."""
        wanted, found = memoryview(data), self._buffer(len(data))
        self._reader.read_into(offset_bytes, found)
        # bytes compare with memcmp, memoryviews item by item.
        if bytes(found) != bytes(wanted):
            self._record(offset_bytes, wanted, found)

    def differences(self) -> Iterator[Failure]:
        """The tensors that differ, with the position of the first difference, and the header if it differs."""
        places = {place.spec.name: place for place in self._places}
        for name, offset_bytes in self._first.items():
            if name is None:
                yield Failure(self._file, "its header differs from the one made from the source")
            else:
                position = _position(places[name], offset_bytes)
                yield Failure(self._file, f"differs from the conversion of the source, first at {position}", name)

    def close(self) -> None:
        self._reader.close()

    def _buffer(self, size_bytes: int) -> memoryview:
        buffer: memoryview | None = getattr(self._buffers, "view", None)
        if buffer is None or len(buffer) < size_bytes:
            buffer = self._buffers.view = memoryview(bytearray(size_bytes))
        return buffer[:size_bytes]

    def _record(self, offset_bytes: int, wanted: memoryview, found: memoryview) -> None:
        first = offset_bytes + next(place for place in range(len(wanted)) if wanted[place] != found[place])
        name = None
        if offset_bytes >= self._header_bytes:
            name = self._places[bisect_right(self._starts, first) - 1].spec.name
        with self._lock:
            self._first[name] = min(first, self._first.get(name, first))


def _position(place: StoredTensor, offset_bytes: int) -> str:
    """The index of the element that contains a byte of the file."""
    element = (offset_bytes - place.offset_bytes) * 8 // DTYPE_BITS[place.spec.dtype]
    index: list[int] = []
    for extent in reversed(place.spec.shape):
        element, remainder = divmod(element, max(extent, 1))
        index.insert(0, remainder)
    return f"[{', '.join(map(str, index))}]"
