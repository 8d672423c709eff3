"""What running a model needs besides int8cli's own dependencies: told without torch."""

from int8cli.errors import MissingExtraError


def require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"running a model needs {error.name}, which is not installed",
            hint="pip install 'int8cli[calibrate]', or use --from weights.",
        ) from error
