"""A checkpoint on this machine: a directory, or one file with its config beside it.

Owns which files of a directory belong to the source. Never writes.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from int8cli.checkpoint.disk import reading_error, reading_errors
from int8cli.checkpoint.file_state import FileState
from int8cli.checkpoint.reader import open_to_read
from int8cli.checkpoint.source import LocalFile, SourceIdentity, checked_file_name, is_hidden
from int8cli.errors import CorruptShardError, ModelNotFoundError, PlaceError, SourceError

# Files beside a single checkpoint file that are other checkpoints or their indexes, and do not belong to it.
_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)


def is_weight_name(file_name: str) -> bool:
    """Whether a file name is typical of a checkpoint or of an index."""
    return file_name.lower().endswith(_WEIGHT_SUFFIXES)


class DirectorySource:
    """The files under a directory, or one checkpoint file and the files beside it that are not weights.

    Symlinks to files are followed, since the snapshots of a Hub cache consist of them; symlinks to directories are not.
    Only shards may be links to files outside the source. A file must not change after it was first used. `output`,
    where the result will be, may be below the source, and then does not belong to it; it cannot be the source itself.
    """

    def __init__(self, path: Path, *, output: Path | None = None) -> None:
        """Raises ModelNotFoundError if there is nothing at `path`, PlaceError if `output` is the source itself."""
        path = Path(os.path.abspath(path))
        kind = _kind_of(path)
        self._root = path if kind == stat.S_IFDIR else path.parent
        self._only = None if kind == stat.S_IFDIR else path.name
        self._output = None if output is None else os.path.realpath(output)
        if self._output == os.path.realpath(self._root):
            raise PlaceError(
                f"{output} is the directory of the source",
                hint="Choose another directory: int8cli never changes a source.",
            )
        self._states: dict[str, FileState] = {}
        # Outputs may contain only the last part of this path. The root directory has none.
        self._identity = SourceIdentity(name=path.name or "model", revision=None, on_hub=False)

    @property
    def contains_output(self) -> bool:
        """Whether the output lies below the source."""
        return self._output is not None and Path(self._output).is_relative_to(os.path.realpath(self._root))

    @property
    def identity(self) -> SourceIdentity:
        return self._identity

    @property
    def keeps_in(self) -> Path | None:
        return None

    def list_files(self) -> tuple[str, ...]:
        """All names, also of what cannot be read, such as a link that leads nowhere: using that is an error."""
        return tuple(sorted(self._walk() if self._only is None else self._file_and_companions(self._only)))

    def size_bytes(self, file_name: str) -> int:
        return self._scan_shard(file_name)[1].size_bytes

    def open(self, file_name: str) -> BinaryIO:
        path, _ = self._scan_shard(file_name)
        return open_to_read(path, file_name)

    @contextmanager
    def fetch(self, file_name: str) -> Iterator[LocalFile]:
        """Raises CorruptShardError, at the start or end of the context, if the file changed since its first use."""
        path, state = self._scan_shard(file_name)
        local = LocalFile(path, state=state)
        local.require_unchanged(file_name)
        yield local
        local.require_unchanged(file_name)

    def transfers(self, file_name: str) -> bool:
        return False

    def downloads(self, file_name: str) -> tuple[Path, ...]:
        return ()

    def prefetch(self, file_name: str) -> None:
        """Nothing to do: the file is on this machine."""

    def discard(self, file_name: str) -> None:
        raise CorruptShardError(
            f"{file_name} differs from the published file", hint=f"Replace {self._path(file_name)} with a fresh copy."
        )

    def close(self) -> None:
        """Nothing to do: nothing was downloaded."""

    def _path(self, file_name: str) -> Path:
        return self._root / checked_file_name(file_name)

    def _scan_shard(self, file_name: str) -> tuple[Path, FileState]:
        """Where a file is, and its state at its first use. Raises ModelNotFoundError, SourceError."""
        path = self._path(file_name)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            status = None
        except OSError as error:
            raise reading_error(path, error, file_name) from error
        if status is None or not stat.S_ISREG(status.st_mode):
            raise ModelNotFoundError(
                f"{self._identity.name}: {file_name!r} is {_what_instead(path, status)}",
                hint="The checkpoint may be incomplete.",
            )
        if file_name not in self._states:
            self._refuse_link_outside(path, file_name)
        return path, self._states.setdefault(file_name, FileState.of(status))

    def _refuse_link_outside(self, path: Path, file_name: str) -> None:
        """A link may lead to a file of the source or, in a snapshot of the Hub cache, to one of its blobs.

        Weights may be anywhere: a shard cannot expose another file's content, and large models are spread over disks.
        """
        if not path.is_symlink() or _is_shard_name(file_name):
            return
        root = os.path.realpath(self._root)
        # Only the first link to a blob is checked: the blob may itself be a link, into a store that is shared further.
        named = os.path.normpath(os.path.join(os.path.realpath(path.parent), os.readlink(path)))
        blobs = _blobs_of(Path(root))
        if blobs is not None and Path(named).parent == blobs:
            return
        target = os.path.realpath(path)
        if not Path(target).is_relative_to(root):
            raise SourceError(
                f"{file_name} is a link to {target}, outside {self._identity.name}",
                hint="If the file belongs to the model, replace the link with the file itself.",
            )

    def _walk(self) -> Iterator[str]:
        def stop(error: OSError) -> None:
            raise reading_error(self._root, error, self._identity.name) from error

        for directory, subdirectories, names in os.walk(self._root, onerror=stop):
            subdirectories[:] = [
                name
                for name in subdirectories
                if not is_hidden(name) and os.path.realpath(os.path.join(directory, name)) != self._output
            ]
            for name in [*names, *filter(_is_expected_to_be_a_file, subdirectories)]:
                path = Path(directory, name)
                if not is_hidden(name) and not _is_link_to_directory(path):
                    yield path.relative_to(self._root).as_posix()

    def _file_and_companions(self, only: str) -> Iterator[str]:
        yield only
        with reading_errors(self._root, self._identity.name):
            names = os.listdir(self._root)
        for name in names:
            if name == only or is_hidden(name) or is_weight_name(name):
                continue
            if _is_expected_to_be_a_file(name) or not os.path.isdir(self._root / name):
                yield name


def _kind_of(path: Path) -> int:
    """S_IFDIR or S_IFREG: whether a path is a directory or a file. Raises ModelNotFoundError, SourceError."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFoundError(f"{path}: no such file or directory") from error
    except OSError as error:
        raise reading_error(path, error) from error
    if kind not in (stat.S_IFDIR, stat.S_IFREG):
        raise ModelNotFoundError(f"{path} is neither a directory nor a file")
    return kind


def _is_expected_to_be_a_file(name: str) -> bool:
    return name.endswith(".json")


def _is_link_to_directory(path: Path) -> bool:
    return os.path.islink(path) and os.path.isdir(path) and not _is_expected_to_be_a_file(path.name)


def _what_instead(path: Path, status: os.stat_result | None) -> str:
    """What is in the place of a file."""
    if status is not None:
        return "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
    return f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "missing"


def _is_shard_name(file_name: str) -> bool:
    return is_weight_name(file_name) and not file_name.endswith(".json")


def _blobs_of(root: Path) -> Path | None:
    """The directory of blobs, if `root` is, or is in, a snapshot of the Hub cache; otherwise None.

    https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    return next((at.parent / "blobs" for at in root.parents if at.name == "snapshots"), None)
