"""Write requirements-vllm.lock: the versions in the environment that runs this, which `make lock-vllm` has made anew.

uv cannot resolve these for several platforms as it does for the other lock files: vLLM's CPU build asks for
`torch==2.13.0+cpu`, a local version, which PyPI does not have. So the file is what pip has installed, and holds for
Linux on x86-64 and the Python of this environment.
"""

import importlib.metadata
import platform

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from pins import ASKED_FOR, LOCKED, VLLM, group, read_pins, read_project

HEADER = """\
# The versions of `make test-vllm`, on Linux x86-64 with Python {}: those that vLLM's CPU build asks for.
# Made by `make lock-vllm`. Used as constraints: a line installs nothing by itself.
"""


def main() -> None:
    VLLM.write_text(HEADER.format(".".join(platform.python_version_tuple()[:2])) + "".join(lines()))


def lines() -> list[str]:
    """One pin for each installed package, with the packages that require it; and uv, which may install torch."""
    installed = {canonicalize_name(each.name): each for each in importlib.metadata.distributions()}
    via: dict[str, set[str]] = {name: set() for name in installed}
    by_extra: dict[str, set[str]] = {name: set() for name in installed}
    for name, distribution in installed.items():
        for requirement in map(Requirement, distribution.requires or ()):
            needed = canonicalize_name(requirement.name)
            always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            (via if always else by_extra).get(needed, set()).add(name)
    project = read_project()
    for requirement in (*group(project, "vllm"), *group(project, "install"), *group(project, "lock")):
        via.get(canonicalize_name(requirement.name), set()).add("int8cli")
    versions = {pin.name: str(pin.version) for pin in read_pins(LOCKED.read_text()) if pin.name == "uv"}
    versions |= {name: Version(each.version).public for name, each in installed.items() if name != "int8cli"}
    return [
        f"{name}=={versions[name]}  # via {_who(via.get(name) or by_extra.get(name) or {'int8cli'})}\n"
        for name in sorted(versions)
    ]


def _who(names: set[str]) -> str:
    return ", ".join(f"{ASKED_FOR})" if name == "int8cli" else name for name in sorted(names))


if __name__ == "__main__":
    main()
