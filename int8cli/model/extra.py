"""What running a model needs besides int8cli's own dependencies: told without torch."""

import importlib.util

from int8cli.errors import MissingTransformersError


def has_transformers() -> bool:
    """Whether it seems to be installed; that takes a second less than to import it."""
    return importlib.util.find_spec("transformers") is not None


def require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingTransformersError(
            f"running a model needs {error.name}, which is not installed",
            hint="pip install 'int8cli[calibrate]'.",
        ) from error
