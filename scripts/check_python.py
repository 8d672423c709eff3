"""Whether the Python that runs this is one that the lock files are for. `make` asks before it installs anything.

    python scripts/check_python.py

The versions are those of the classifiers in pyproject.toml. For another one, packages would be installed in versions
that are not locked, or not at all. Any Python 3.5 or newer can run it, without packages.
"""

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def declared(text: str) -> list:
    """The (major, minor) pairs that the text of pyproject.toml declares."""
    return [(int(major), int(minor)) for major, minor in re.findall(r":: Python :: (3)\.([0-9]+)\"", text)]


def main() -> None:
    known = declared(PYPROJECT.read_text(encoding="utf-8"))
    if tuple(sys.version_info[:2]) not in known:
        names = ", ".join("{}.{}".format(*pair) for pair in known)
        sys.exit(
            "error: {} is Python {}.{}; the lock files are for {}\n"
            "hint: Name another one: make PYTHON=python{}.{} ...".format(
                sys.executable, sys.version_info[0], sys.version_info[1], names, *known[-1]
            )
        )


if __name__ == "__main__":
    main()
