"""The package versions of an environment: what the lock files say, and whether the environment agrees.

    python scripts/pins.py print locked --torch 2.13.0     # print the constraints that `make` gives to pip
    python scripts/pins.py check locked --torch 2.13.0     # check the versions in the environment that runs this

There are three ends. `locked` has the versions of requirements.lock, `oldest` those of requirements-oldest.lock (the
lower bounds in pyproject.toml), and `newest` the newest in the index. In all three, the tools that check the code have
their locked versions. `vllm` has those of requirements-vllm.lock: an environment apart, which vLLM sets the ranges of.
Only reads files and installed metadata; lock.py and lock_vllm.py write the lock files.
"""

import argparse
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = ROOT / "pyproject.toml"
LOCKED = ROOT / "requirements.lock"
OLDEST = ROOT / "requirements-oldest.lock"
VLLM = ROOT / "requirements-vllm.lock"

# Always at their locked versions, so that a new linter cannot fail a test of an old torch.
HELD_GROUPS = ("tools", "install", "lock")
# Groups with a lock file of their own.
APART_GROUPS = ("vllm",)
# How uv names the package itself, for requirements in pyproject.toml.
ASKED_FOR = "int8cli (pyproject.toml"


@dataclass(frozen=True, slots=True)
class Pin:
    """One line of a lock file: `name==version ; marker  # via who, who else`."""

    name: str
    version: Version
    marker: Marker | None
    via: tuple[str, ...]

    @property
    def asked_for(self) -> bool:
        """Whether pyproject.toml names it. Otherwise only another package needs it."""
        return any(who.startswith(ASKED_FOR) for who in self.via)


def read_pins(text: str) -> list[Pin]:
    """The pins in the text of a lock file. Raises ValueError with the first invalid line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [_pin(line) for line in lines]


def _pin(line: str) -> Pin:
    requirement, _, via = line.partition("# via ")
    parsed = Requirement(requirement.strip())
    exact = re.fullmatch(r"==([^*,]+)", str(parsed.specifier))
    if parsed.url or exact is None:
        raise ValueError(f"not one version of one package: {line}")
    who = tuple(name.strip() for name in via.split(", ") if name.strip())
    return Pin(canonicalize_name(parsed.name), Version(exact[1]), parsed.marker, who)


def read_project(path: Path = PYPROJECT) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def requirements(project: dict[str, Any]) -> list[Requirement]:
    """The requirements in pyproject.toml of all but `APART_GROUPS`: to run, to build, of each extra and group."""
    table = project["project"]
    lists = [project["build-system"]["requires"], table["dependencies"], *table["optional-dependencies"].values()]
    asked = [Requirement(line) for lines in lists for line in lines]
    groups = [name for name in project["dependency-groups"] if name not in APART_GROUPS]
    return asked + [item for name in groups for item in group(project, name)]


def group(project: dict[str, Any], name: str) -> list[Requirement]:
    """The requirements of a dependency group, without those of groups that it includes."""
    return [Requirement(line) for line in project["dependency-groups"][name] if isinstance(line, str)]


def held(project: dict[str, Any]) -> set[str]:
    """The packages that have their locked version in every environment."""
    return {canonicalize_name(item.name) for name in HELD_GROUPS for item in group(project, name)}


def constraints(end: str, torch: str | None) -> list[str]:
    """The lines of the constraints file for an end. For `torch`, see `torch_line`."""
    lines = {"locked": LOCKED, "oldest": OLDEST, "newest": LOCKED, "vllm": VLLM}[end].read_text().splitlines()
    if end == "newest":
        names = held(read_project())
        lines = [line for line in lines if _name(line) in names]
    lines = [line.partition("# via ")[0].strip() for line in lines if _name(line) not in (None, "torch")]
    return [*lines, *torch_line(torch)]


def torch_line(torch: str | None) -> list[str]:
    """The constraint on torch. `torch` is a version, "oldest", "newest", or None for the locked version.

    It does not depend on the end, because CPU builds are not available everywhere in every version.
    """
    if torch == "newest":
        return []
    path = OLDEST if torch == "oldest" else LOCKED
    found = next(str(pin.version) for pin in read_pins(path.read_text()) if pin.name == "torch")
    return [f"torch=={found if torch in (None, 'oldest') else torch}"]


def _name(line: str) -> str | None:
    match = re.match(r"[A-Za-z0-9][\w.-]*", line)
    return canonicalize_name(match[0]) if match else None


def disagreements(project: dict[str, Any], text: str) -> Iterator[str]:
    """The differences between a lock file and pyproject.toml: packages that are missing, out of range, or not needed.

    For a package that only other packages need, the names that uv has written are believed.
    """
    pins = read_pins(text)
    names = {pin.name for pin in pins}
    asked = {canonicalize_name(requirement.name) for requirement in requirements(project)}
    yield from (f"{name} is not locked" for name in sorted(asked - names))
    for requirement in requirements(project):
        found = [pin for pin in pins if pin.name == canonicalize_name(requirement.name)]
        yield from (f"{pin.name} {pin.version} is not {requirement}" for pin in found if not _admits(requirement, pin))
    for environment in environments(project):
        here = {pin.name for pin in pins if pin.marker is None or pin.marker.evaluate(environment)}
        yield from (f"{name} is not locked where {environment}" for name in sorted(names - here))
    for pin in pins:
        if pin.asked_for != (pin.name in asked):
            yield f"{pin.name} {pin.version} is locked as {'' if pin.asked_for else 'not '}named in pyproject.toml"
        if not pin.asked_for and not any(canonicalize_name(who) in names for who in pin.via):
            yield f"{pin.name} {pin.version} is locked, and nothing locked needs it"


def environments(project: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The environments to evaluate markers in: each declared version of Python, on Linux and on macOS."""
    for python in pythons(project):
        for platform in ("linux", "darwin"):
            yield {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": platform}


def pythons(project: dict[str, Any]) -> list[str]:
    """The Python versions that the package declares, such as 3.11."""
    classifiers = project["project"]["classifiers"]
    return [match[1] for line in classifiers if (match := re.fullmatch(r".* :: Python :: (3\.\d+)", line))]


def _admits(requirement: Requirement, pin: Pin) -> bool:
    return requirement.specifier.contains(pin.version, prereleases=True)


def not_as_pinned(pins: Iterable[Pin], complete: bool) -> Iterator[str]:
    """The installed packages with another version than their pin and, if pins are `complete`, those without a pin."""
    pinned = {pin.name: pin.version for pin in pins if pin.marker is None or pin.marker.evaluate()}
    for distribution in importlib.metadata.distributions():
        name, version = canonicalize_name(distribution.name), Version(distribution.version)
        if name == "int8cli":
            continue
        if name not in pinned:
            if complete:
                yield f"{name} {version} is installed, and no version of it is locked"
        elif pinned[name] not in (version, Version(version.public)):  # 2.13.0+cpu is a build of 2.13.0
            yield f"{name} {version} is installed, not {pinned[name]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["print", "check"])
    parser.add_argument("end", choices=["locked", "oldest", "newest", "vllm"])
    parser.add_argument("--torch", help="a version of torch, or oldest or newest, instead of the locked one")
    arguments = parser.parse_args()
    lines = constraints(arguments.end, arguments.torch)
    if arguments.action == "print":
        print("\n".join(lines))
    elif faults := list(not_as_pinned(read_pins("\n".join(lines)), complete=arguments.end != "newest")):
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
