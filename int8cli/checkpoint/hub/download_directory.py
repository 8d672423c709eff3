"""Where files lie that are here only while they are used.

Owns a directory of ours: parts until they are whole, files until nobody wants them any more.
"""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from int8cli.checkpoint.hub.remote_files import RemoteFiles
from int8cli.checkpoint.hub.repository import Repository

_COMMIT = re.compile(r"[0-9a-f]{40}")


class DownloadDirectory:
    """The files of one repository in a directory that is this source's alone."""

    def __init__(self, root: Path, repository: Repository, remote: RemoteFiles) -> None:
        self._root = root
        self._repository = repository
        self._remote = remote

    def path(self, file_name: str) -> Path:
        """Where a file lies once it is whole."""
        # The commit stands in the path, so that no part of another revision is ever gone on from.
        return self._root / self._repository.commit / file_name

    def bring(self, file_name: str) -> Path:
        """Download the file, unless it is here, whole, from a run that was killed."""
        path = self.path(file_name)
        if not (path.is_file() and path.stat().st_size == self._remote.published(file_name).size_bytes):
            part = part_of(path)
            self._remove_other_commits()
            self._remote.download(file_name, part)
            os.replace(part, path)
        return path

    def remove(self, file_name: str) -> None:
        path = self.path(file_name)
        path.unlink(missing_ok=True)
        part_of(path).unlink(missing_ok=True)

    def remove_empty_directories(self) -> None:
        """Only rmdir: whatever still holds a part, or anything we did not put there, stays.

        Left to the end, since before that a download in the background may be about to write into one.
        """
        root = self._root
        below = sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True) if root.is_dir() else []
        for directory in [*below, root]:
            with suppress(OSError):
                directory.rmdir()

    def _remove_other_commits(self) -> None:
        """Parts of another revision can never be gone on from; they would only take up the disk."""
        for directory in self._root.iterdir() if self._root.is_dir() else ():
            if _COMMIT.fullmatch(directory.name) and directory.name != self._repository.commit:
                shutil.rmtree(directory, ignore_errors=True)


def part_of(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(f"{path.name}.incomplete")
