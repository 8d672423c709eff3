"""What a disk that takes no more looks like to the user.

Owns the translation of the file system's errors on writing into ours.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from int8cli.errors import DiskSpaceError, OutputError


@contextmanager
def disk_errors(path: Path, wanted_bytes: int = 0) -> Iterator[None]:
    """Raise DiskSpaceError or OutputError for an OSError. Put it around what writes `path`, and around nothing else."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error, wanted_bytes) from error


def disk_error(path: Path, error: OSError, wanted_bytes: int = 0) -> OutputError:
    """What to say when `path` could not be written, or could not grow by `wanted_bytes`, where that is known."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        wanted = f" for {wanted_bytes:,} bytes more" if wanted_bytes else ""
        return DiskSpaceError(
            f"{path}: not enough disk space{wanted} ({error.strerror})",
            hint="Free some space and run the same command again: finished shards are not converted again.",
        )
    return OutputError(
        f"{path}: cannot be written ({error.strerror or error})", hint="Choose a directory that you can write to."
    )
