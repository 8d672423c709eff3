"""Reading a shard's bytes at an offset into a buffer that the caller owns.

Owns how bytes come off the disk. Knows nothing of tensors but their offsets.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from int8cli.errors import CorruptShardError, SourceError

if TYPE_CHECKING:
    from torch import Tensor


class ShardReader(Protocol):
    """Random access to a shard's bytes; safe to call from several threads at once."""

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset_bytes` on. Raises CorruptShardError where the shard ends early."""

    def close(self) -> None: ...


class FileReader:
    """A shard on disk, read with preadv: no mapping, so that nothing stays resident but the caller's buffer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise unreadable(path, error) from error

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], offset_bytes + done)
            except OSError as error:
                raise unreadable(self._path, error) from error
            if count == 0:
                raise CorruptShardError(
                    f"{self._path.name}: ends at byte {offset_bytes + done:,}, before the data its header names",
                    hint="The file is truncated, or changed during reading: download it again, then run again.",
                )
            done += count

    def close(self) -> None:
        os.close(self._descriptor)


def unreadable(path: Path, error: OSError) -> SourceError:
    """What to say when the system does not give a source file's bytes."""
    return SourceError(
        f"{path.name} cannot be read: {error.strerror or error}", hint=f"Check {path}: its permissions, and its disk."
    )


class TensorsReader:
    """A shard that is in memory already, read as the concatenation of its tensors' bytes.

    Serves legacy `.bin` files, whose format cannot be read at an offset. `tensors` are in the order of its contents.
    """

    def __init__(self, tensors: "Sequence[Tensor]") -> None:
        import torch

        self._runs = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
        self._ends = list(accumulate(len(run) for run in self._runs))

    def read_into(self, offset_bytes: int, buffer: memoryview) -> None:
        import torch

        done = 0
        index = bisect_right(self._ends, offset_bytes)
        while done < len(buffer):
            run = self._runs[index]
            start = offset_bytes + done - (self._ends[index] - len(run))
            count = min(len(run) - start, len(buffer) - done)
            if count:
                torch.frombuffer(buffer[done : done + count], dtype=torch.uint8).copy_(run[start : start + count])
            done += count
            index += 1

    def close(self) -> None:
        self._runs = []
