"""A checkpoint on this machine: a directory, or one file with its config beside it.

Owns which files of a directory belong to the source. Reads nothing but names and sizes; never writes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from int8cli.checkpoint.source import LocalFile, SourceIdentity, checked_file_name, is_hidden
from int8cli.errors import CorruptShardError, ModelNotFoundError, OutputError, SourceError

# Beside a single checkpoint file, what is another checkpoint (or the index of one) and no companion of it.
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
    """Whether the name is one that checkpoints, or their indexes, are stored under."""
    return file_name.lower().endswith(_WEIGHT_SUFFIXES)


class DirectorySource:
    """The files under a directory, or one checkpoint file and the files beside it that are no weights.

    Symlinks to files are followed, as a Hub cache's snapshots consist of them; symlinks to directories are not.
    `output`, where the result will be, may lie below the source and is then no part of it; it cannot be the source.
    """

    def __init__(self, path: Path, *, output: Path | None = None) -> None:
        """Raises ModelNotFoundError if there is nothing at `path`, OutputError if `output` is the source itself."""
        path = Path(os.path.abspath(path))
        if not os.path.exists(path):
            raise ModelNotFoundError(f"{path}: no such file or directory")
        if not (path.is_dir() or path.is_file()):
            raise ModelNotFoundError(f"{path} is neither a directory nor a file")
        self._root = path if path.is_dir() else path.parent
        self._only = None if path.is_dir() else path.name
        self._output = None if output is None else os.path.realpath(output)
        if self._output == os.path.realpath(self._root):
            raise OutputError(
                f"{output} is the directory of the source",
                hint="Choose another directory: int8cli never changes a source.",
            )
        # A name is all that the outputs may carry of this path; only the root directory has none.
        self._identity = SourceIdentity(name=path.name or "model", revision=None, on_hub=False)

    @property
    def identity(self) -> SourceIdentity:
        return self._identity

    @property
    def keeps_in(self) -> Path | None:
        return None

    def list_files(self) -> tuple[str, ...]:
        return tuple(sorted(self._walk() if self._only is None else self._file_and_companions(self._only)))

    def size_bytes(self, file_name: str) -> int:
        return self._path(file_name).stat().st_size

    def open(self, file_name: str) -> BinaryIO:
        try:
            return self._path(file_name).open("rb")
        except OSError as error:
            raise _unreadable(file_name, error) from error

    @contextmanager
    def fetch(self, file_name: str) -> Iterator[LocalFile]:
        yield LocalFile(self._path(file_name))

    def transfers(self, file_name: str) -> bool:
        return False

    def prefetch(self, file_name: str) -> None:
        """Nothing to do: the file is here."""

    def discard(self, file_name: str) -> None:
        raise CorruptShardError(
            f"{file_name} differs from what was published", hint=f"Replace {self._path(file_name)} with a fresh copy."
        )

    def close(self) -> None:
        """Nothing to do: nothing was brought here."""

    def _path(self, file_name: str) -> Path:
        path = self._root / checked_file_name(file_name)
        if not path.is_file():
            raise ModelNotFoundError(
                f"{self._identity.name}: {file_name!r} is missing", hint="The checkpoint may be incomplete."
            )
        return path

    def _walk(self) -> Iterator[str]:
        def stop(error: OSError) -> None:
            raise _unreadable(self._identity.name, error) from error

        for directory, subdirectories, names in os.walk(self._root, onerror=stop):
            subdirectories[:] = [
                name
                for name in subdirectories
                if not is_hidden(name) and os.path.realpath(os.path.join(directory, name)) != self._output
            ]
            for name in names:
                path = Path(directory, name)
                if not is_hidden(name) and path.is_file():
                    yield path.relative_to(self._root).as_posix()

    def _file_and_companions(self, only: str) -> Iterator[str]:
        yield only
        for path in self._root.iterdir():
            if path.name != only and path.is_file() and not is_hidden(path.name) and not is_weight_name(path.name):
                yield path.name


def _unreadable(name: str, error: OSError) -> SourceError:
    return SourceError(f"{name} cannot be read: {error.strerror or error}", hint="Check its permissions.")
