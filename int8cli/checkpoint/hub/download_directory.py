"""The directory for files that are on this machine only while they are used.

Owns its paths: partial files until they are complete, and files until they are no longer needed.
"""

import os
import re
from pathlib import Path

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.hub.remote_files import RemoteFiles
from int8cli.checkpoint.hub.repository import Repository
from int8cli.checkpoint.own_files import (
    OwnPath,
    name_aside,
    opened_directory,
    remove_empty_directories,
    remove_file,
    remove_tree,
)
from int8cli.checkpoint.reader import size_of

_COMMIT = re.compile(r"[0-9a-f]{40}")


class DownloadDirectory:
    """The files of one repository, in a directory that only this source uses."""

    def __init__(self, root: OwnPath, repository: Repository, remote: RemoteFiles) -> None:
        self._root = root.path
        self._below = root.below
        self._repository = repository
        self._remote = remote
        self._downloaded: set[str] = set()

    def path(self, file_name: str) -> Path:
        """The place of a file once it is complete."""
        # The path contains the commit, so that a part of another revision is never resumed.
        return self._root / self._repository.commit / file_name

    def download(self, file_name: str) -> Path:
        """Download the file, unless an earlier run that was killed has downloaded all of it.

        What that run has left is compared with the published digest: nothing of it was flushed to the disk, and after a
        power failure a file can have its size and other bytes.
        """
        path = self.path(file_name)
        if not self._is_complete(file_name, path):
            part = part_of(path)
            self._remove_other_commits()
            self._remote.download(file_name, part, self._below)
            with disk_errors(path), opened_directory(path.parent, self._below) as directory:
                os.replace(part.name, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        self._downloaded.add(file_name)
        return path

    def _is_complete(self, file_name: str, path: Path) -> bool:
        published = self._remote.published(file_name)
        if not os.path.isfile(path) or size_of(path) != published.size_bytes:
            return False
        return file_name in self._downloaded or published.has_digest_of(path)

    def remove(self, file_name: str) -> None:
        self._downloaded.discard(file_name)
        path = self.path(file_name)
        for each in (path, part_of(path)):
            with disk_errors(each):
                remove_file(each, self._below)

    def remove_empty_directories(self) -> None:
        """Remove only empty directories: parts, and files that are not ours, stay.

        Call this last, since a download in the background may be about to write into one of them.
        """
        remove_empty_directories(self._root, self._below)

    def _remove_other_commits(self) -> None:
        """Remove parts of other revisions. They can never be resumed, and only use disk space."""
        for directory in self._root.iterdir() if self._root.is_dir() else ():
            if _COMMIT.fullmatch(directory.name) and directory.name != self._repository.commit:
                remove_tree(directory, self._below)


def part_of(path: Path) -> Path:
    """The place of a file until it is complete."""
    return path.with_name(name_aside(path.name, suffix=".incomplete"))
