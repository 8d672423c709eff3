"""Default directories for outputs and saved state."""

import hashlib
import os
import re
from pathlib import Path

from int8cli.errors import OptionError

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/+[^/]", re.IGNORECASE)


def chosen_output(output: str | Path | None, model: str) -> Path:
    """Where to write a conversion of `model`. Raises OptionError as `output_directory`."""
    return default_output(model) if output is None else output_directory(output)


def output_directory(output: str | Path) -> Path:
    """A directory of this machine to write to. Raises OptionError for what names none.

    Path takes an empty name for `.`, and makes a directory s3: of an address such as s3://bucket/model.
    """
    name = str(output) if output != "" else ""
    if not name or "\0" in name:
        raise OptionError("it is empty" if not name else "it has a null byte", option="output")
    if _ADDRESS.match(name) and not os.path.lexists(name):
        raise OptionError(
            f"{name} is an address, not a directory", option="output", hint="Choose a directory, and push from there."
        )
    return Path(output)


def default_output(model: str) -> Path:
    """`<name>-int8` in the current directory, for a Hub id, a directory or a file."""
    path = Path(os.path.expanduser(model))
    if os.path.isfile(path):
        return Path(f"{path.stem}-int8")
    name = Path(os.path.realpath(path)).name if os.path.exists(path) else model.rstrip("/").rpartition("/")[2]
    return Path(f"{name}-int8")


def cache_directory() -> Path:
    """The directory of this program in the user's cache."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "int8cli"


def work_directory(chosen: Path | None, model: str, revision: str | None) -> Path:
    """Where the state of a run is saved: a directory for this model, inside `chosen` or the user's cache."""
    path = Path(os.path.expanduser(model))
    name = os.path.realpath(path) if os.path.exists(path) else f"{model}@{revision}"
    return (chosen or cache_directory()) / hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
