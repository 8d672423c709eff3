"""Where a command keeps what a later run of the same command goes on from."""

import hashlib
import os
from pathlib import Path


def work_directory(chosen: Path | None, model: str, revision: str | None) -> Path:
    """A directory for a model, the same for the same command: below the one chosen, or the user's cache."""
    path = Path(model).expanduser()
    name = str(path.resolve()) if path.exists() else f"{model}@{revision}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "int8cli"
    return (chosen or cache) / hashlib.sha256(name.encode()).hexdigest()[:16]
