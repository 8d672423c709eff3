"""Finds and opens the source that a MODEL argument names.

Owns the decision whether an argument is a path on this machine or a repository on the Hub, and closes what it opens.
"""

import difflib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from int8cli.checkpoint.directory import DirectorySource, is_weight_name
from int8cli.checkpoint.hub import HubOptions, HubSource, RetryPolicy
from int8cli.checkpoint.object_store import is_remote, shown_address
from int8cli.checkpoint.remote import StoreSource
from int8cli.checkpoint.source import Source
from int8cli.errors import ModelNotFoundError, SourceError, TransferError
from int8cli.progress import SILENT, Progress

DOWNLOAD = "download"


def open_source(
    model: str,
    *,
    revision: str | None,
    download_dir: Path,
    output: Path | None = None,
    keep_source: bool = False,
    retry_for_s: float | None = None,
    on_bytes: Callable[[str, int], None] | None = None,
    on_wait: Callable[[str, str, float], None] | None = None,
) -> Source:
    """The source that `model` names: what exists on this machine under that name, else an address, else a repository.

    A Hub repository is asked for its commit at once, so that whoever gets a source back has one that exists. What
    looks like a path is never asked of the Hub. `download_dir` and the callbacks are those of `HubOptions`, `output` is
    that of `DirectorySource`. `retry_for_s`: how long a transfer that fails without progress is tried again, None for
    two minutes. Raises ModelNotFoundError, AccessDeniedError, TransferError, OutputError.
    """
    path = Path(os.path.expanduser(model))
    if model and os.path.exists(path):  # unlike Path's own, false rather than an error where looking is not allowed
        _refuse_revision(model, revision)
        return DirectorySource(path, output=output)
    if is_remote(model) and revision is not None:
        raise SourceError(f"{shown_address(model)} has no revision {revision!r}", hint="Leave the revision out.")
    if not is_remote(model) and looks_like_a_path(model):
        raise ModelNotFoundError(f"{model or 'MODEL'}: no such file or directory", hint=_hint_for(model, path))
    probably_a_path = "/" not in model or path.parent.is_dir()
    options = HubOptions(
        download_dir=download_dir,
        keep_source=keep_source,
        retry=RetryPolicy(patience_s=retry_for_s),
        on_bytes=on_bytes,
        on_wait=on_wait,
        download_below=output if output is not None and download_dir.is_relative_to(output) else None,
        probably_a_path=probably_a_path,
    )
    if is_remote(model):
        return StoreSource(model, options)
    source = HubSource(model, revision, options)
    _resolve(source, model, path, probably_a_path=probably_a_path)
    return source


def _refuse_revision(model: str, revision: str | None) -> None:
    """Raise SourceError for a revision of a model that is on this machine."""
    if revision is not None:
        raise SourceError(
            f"{model} is a local path and has no revision {revision!r}",
            hint="Leave the revision out, or give the Hub id of the model.",
        )


def _resolve(source: HubSource, model: str, path: Path, *, probably_a_path: bool) -> None:
    """Ask the Hub for the source's commit. An error about a probable path says that it does not exist here either."""
    try:
        source.resolve()
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            _not_here_either(error, model, probably_a_path), hint=f"{error.hint} {_hint_for(model, path)}".strip()
        ) from error
    except TransferError as error:
        if not probably_a_path:
            raise
        raise TransferError(
            _not_here_either(error, model, probably_a_path),
            hint=f"{_hint_for(model, path)} If you mean a repository on the Hub, check the network and HF_ENDPOINT.",
        ) from error


def _not_here_either(error: SourceError, model: str, probably_a_path: bool) -> str:
    """What the Hub said of a name that may have been meant as a path."""
    return f"there is no directory or file {model} here, and on the Hub: {error}" if probably_a_path else str(error)


@contextmanager
def opened_source(
    model: str,
    *,
    revision: str | None,
    download_dir: Path,
    output: Path | None = None,
    keep_source: bool = False,
    retry_for_s: float | None = None,
    progress: Progress = SILENT,
) -> Iterator[Source]:
    """The source that `model` names, closed at the end. `progress` shows transfers. Raises as `open_source` does."""
    transfers = _Transfers(progress)
    source = open_source(
        model,
        revision=revision,
        download_dir=download_dir,
        output=output,
        keep_source=keep_source,
        retry_for_s=retry_for_s,
        on_bytes=transfers.received,
        on_wait=transfers.waiting,
    )
    try:
        yield source
    finally:
        source.close()
        transfers.close()


class _Transfers:
    """Reports transfers to a progress, as a task that begins with the first byte and whose parts are not known."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._open = True
        self._begun = False

    def received(self, file: str, count: int) -> None:
        with self._lock:
            if not self._open:  # a stalled transfer in the background may outlive its source
                return
            if not self._begun:
                self._progress.begin(DOWNLOAD, {})
                self._begun = True
            self._progress.advance(DOWNLOAD, file, count)

    def waiting(self, what: str, why: str, pause_s: float) -> None:
        self._progress.note(f"{what}: {why}; trying again in {pause_s:.0f} s")

    def close(self) -> None:
        with self._lock:
            self._open = False
            if self._begun:
                self._progress.done(DOWNLOAD)


def looks_like_a_path(model: str) -> bool:
    return (
        not model
        or model.startswith((".", "/", "~"))
        or model.endswith("/")
        or "\\" in model
        or model.count("/") > 1
        or is_weight_name(model)
    )


def _hint_for(model: str, path: Path) -> str:
    if "://" in model:
        return "Give the Hub id alone, as in bigscience/bloom."
    close = _close_names(path)
    if close:
        return f"On this machine there is {' and '.join(close)}."
    return "MODEL is a Hub id (org/name), a directory, one checkpoint file, or an address such as s3://bucket/model."


def _close_names(path: Path) -> list[str]:
    """Files and directories beside `path` with similar names, spelled as the user spelled the path."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or is_weight_name(entry.name)]
    except OSError:
        return []
    return [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, names, n=2)] if path.name else []
