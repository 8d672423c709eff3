"""Whether a file on this machine is unchanged since it was first used.

Owns which properties are compared. They cost nothing to read; a digest of the bytes is compared where one is known.
"""

import os
from dataclasses import dataclass

from int8cli.errors import CorruptShardError


@dataclass(frozen=True, slots=True)
class FileState:
    """A file's size, the time of the last write to it, and that of the last change of anything about it.

    The last cannot be set: it tells of a write whose time somebody put back, as tools that copy times do.
    """

    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileState":
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def require_same(self, status: os.stat_result, file_name: str) -> None:
        """Raise CorruptShardError, naming the file, if it was written to in the meantime."""
        now = FileState.of(status)
        if now == self:
            return
        grown = (
            f" (it had {self.size_bytes:,} bytes, now {now.size_bytes:,})" if now.size_bytes != self.size_bytes else ""
        )
        raise CorruptShardError(
            f"{file_name}: changed while it was read{grown}",
            hint="Wait until nothing writes to it, then run the same command again.",
        )
