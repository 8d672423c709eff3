"""Where machines work: in memory where there is a disk in memory, since an fsync takes longer than all the rest."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A random name is made in it, as in any temporary directory.
_IN_MEMORY = Path("/dev/shm")  # nosec B108
_ROOM_BYTES = 1 << 30


@contextmanager
def scratch_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="int8cli-torture-", dir=_place()) as directory:
        yield Path(directory)


def _place() -> Path | None:
    """None for the usual one; TMPDIR goes before everything."""
    if "TMPDIR" in os.environ or not os.access(_IN_MEMORY, os.W_OK):
        return None
    room = os.statvfs(_IN_MEMORY)
    return _IN_MEMORY if room.f_bavail * room.f_frsize > _ROOM_BYTES else None
