"""Default directories for outputs and saved state."""

import hashlib
import os
from pathlib import Path


def default_output(model: str) -> Path:
    """`<name>-int8` in the current directory, for a Hub id, a directory or a file."""
    path = Path(model).expanduser()
    if path.is_file():
        return Path(f"{path.stem}-int8")
    name = path.resolve().name if path.exists() else model.rstrip("/").rpartition("/")[2]
    return Path(f"{name}-int8")


def work_directory(chosen: Path | None, model: str, revision: str | None) -> Path:
    """The directory for the state of a run, the same for the same model: below `chosen` or the user's cache."""
    path = Path(model).expanduser()
    name = str(path.resolve()) if path.exists() else f"{model}@{revision}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "int8cli"
    return (chosen or cache) / hashlib.sha256(name.encode()).hexdigest()[:16]
