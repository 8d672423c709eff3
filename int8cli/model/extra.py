"""The packages that running a model needs besides int8cli's own dependencies. Needs no torch."""

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from int8cli.errors import MissingTransformersError
from int8cli.loaders.transformers_versions import OLDEST_THAT_RUNS, release

_INSTALL = "pip install 'int8cli[calibrate]'."


def has_transformers() -> bool:
    """Whether transformers seems to be installed. Does not import it, which takes a second."""
    return importlib.util.find_spec("transformers") is not None


def require_installed(*others: str) -> None:
    """Raise MissingTransformersError if transformers, or one of the others, is missing or too old.

    Imports nothing, so that a command can ask before it does anything slow.
    """
    for package in ("transformers", *others):
        if importlib.util.find_spec(package) is None:
            raise MissingTransformersError(f"running a model needs {package}, which is not installed", hint=_INSTALL)
    _require_version()


def require_transformers() -> None:
    """Import transformers. Raises MissingTransformersError as `require_installed`, or if a dependency is missing."""
    require_installed()
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingTransformersError(
            f"running a model needs {error.name}, which is not installed", hint=_INSTALL
        ) from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers' own bars stay away: they write over ours, and come out as one long line in a log."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _require_version() -> None:
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return  # a transformers without metadata: no version to compare
    if release(installed) < release(OLDEST_THAT_RUNS):
        raise MissingTransformersError(
            f"running a model needs transformers {OLDEST_THAT_RUNS} or newer; {installed} is installed",
            hint="pip install -U 'int8cli[calibrate]'.",
        )
