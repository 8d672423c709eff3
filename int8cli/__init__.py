"""int8cli: LLM.int8() checkpoints, by streaming."""

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from int8cli.runtime.load import load_model as load_model

# The package uses torch without numpy; torch warns of that in each process that imports it.
warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    """`load_model`, imported when it is asked for: it needs torch, which takes a second to import."""
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from int8cli.runtime.load import load_model

    return load_model
