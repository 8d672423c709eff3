"""Write requirements.lock and requirements-oldest.lock from pyproject.toml, and print which versions changed.

    make lock                      # everything except torch to the newest release
    make lock PACKAGE=ruff         # only this package, and what must change with it
    make lock TORCH=2.14.0         # torch to this release

uv resolves for Linux and macOS and for Python 3.11 to 3.14 ([tool.uv] in pyproject.toml). A package that needs several
versions has one line with a marker for each. torch does not change by default, because CPU builds of a new release are
not immediately available everywhere. The files contain no index and no hashes, so that pip can install a CPU build of
the locked torch.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pins import LOCKED, OLDEST, ROOT, Pin, held, read_pins, read_project

MADE = "# Made by `make lock` from pyproject.toml. Used as constraints: a line installs nothing by itself.\n"
HEADER_LOCKED = f"# The versions of `make demo`, `make test` and `make benchmark`, direct and indirect.\n{MADE}"
HEADER_OLDEST = (
    f"# The versions of `make test-oldest`: the lower bounds of pyproject.toml, and the newest else.\n{MADE}"
)
DOWNLOADED = "# Downloaded for the demo, not installed.\n"
ALL = ("--all-extras", "--group", "dev", "--group", "lock", "--group", "s3")


def main() -> None:
    arguments = _arguments()
    before = {path: path.read_text() if path.exists() else "" for path in (LOCKED, OLDEST)}
    upgrade = [f"--upgrade-package={name}" for name in arguments.package] or ["--upgrade"]
    torch = arguments.torch or _version(before[LOCKED], "torch")
    constraints = [f"torch=={torch}"] if torch else []

    locked = _resolve(["pyproject.toml", *ALL, *upgrade], constraints, before[LOCKED])
    model = _resolve(["--group", "demo", "--no-deps", *upgrade], [], before[LOCKED])
    LOCKED.write_text(f"{HEADER_LOCKED}{locked}{DOWNLOADED}{model}")

    names = held(read_project())
    constraints = [f"{pin.name}=={pin.version}" for pin in read_pins(locked) if pin.name in names]
    lowest = ["pyproject.toml", *ALL, "--resolution", "lowest-direct", *upgrade]
    oldest = _resolve(lowest, constraints, before[OLDEST])
    OLDEST.write_text(f"{HEADER_OLDEST}{oldest}{DOWNLOADED}{model}")
    for path, text in before.items():
        print(f"{path.name}:")
        print("\n".join(moved(read_pins(text), read_pins(path.read_text()))) or "  nothing changed")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", nargs="*", help="change only these")
    parser.add_argument("--torch", help="change torch to this version")
    return parser.parse_args()


def _version(text: str, name: str) -> str | None:
    return next((str(pin.version) for pin in read_pins(text) if pin.name == name), None)


def _resolve(what: list[str], constraints: list[str], before: str) -> str:
    """The pins that uv finds, with the packages that require each. Versions in `before` stay unless upgraded."""
    python = read_project()["project"]["requires-python"].removeprefix(">=")
    with tempfile.TemporaryDirectory() as scratch:
        output, narrowed = Path(scratch, "lock"), Path(scratch, "constraints")
        output.write_text(before, encoding="utf-8")
        narrowed.write_text("\n".join(constraints), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--universal", "--no-header"]
        command += ["--python-version", python, "--annotation-style", "line", "--no-emit-index-url"]
        command += ["--constraint", str(narrowed), "--output-file", str(output), *what]
        if subprocess.run(command, cwd=ROOT).returncode:
            sys.exit(1)  # uv has printed the reason
        text = re.sub(rf"(, )?-c {re.escape(str(narrowed))}(?(1)|, )", "", output.read_text(encoding="utf-8"))
    return "".join(_lines(text))


def _lines(text: str) -> Iterator[str]:
    """uv's lines without needless markers: a constraint on a package that is not installed has no effect."""
    names = Counter(pin.name for pin in read_pins(text))
    for pin in read_pins(text):
        marker = f" ; {pin.marker}" if names[pin.name] > 1 else ""
        yield f"{pin.name}=={pin.version}{marker}  # via {', '.join(pin.via)}\n"


def moved(before: list[Pin], after: list[Pin]) -> list[str]:
    """`  name old -> new` for each package whose versions differ; - stands for none."""
    old, new = _versions(before), _versions(after)
    names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    return [f"  {name} {old.get(name, '-')} -> {new.get(name, '-')}" for name in names]


def _versions(pins: list[Pin]) -> dict[str, str]:
    """The locked versions by name: several if they depend on the version of Python or on the platform."""
    return {name: ", ".join(str(pin.version) for pin in pins if pin.name == name) for name in {p.name for p in pins}}


if __name__ == "__main__":
    main()
