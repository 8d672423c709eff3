"""The lock files match pyproject.toml, and contain only versions."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from check_python import PYPROJECT, declared
from lock import moved
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from pins import (
    ASKED_FOR,
    LOCKED,
    OLDEST,
    ROOT,
    VLLM,
    constraints,
    disagreements,
    group,
    held,
    pythons,
    read_pins,
    read_project,
    requirements,
    torch_line,
)

PROJECT = read_project()


@pytest.mark.parametrize("path", [LOCKED, OLDEST], ids=lambda path: path.name)
def test_a_lock_matches_pyproject(path: Path) -> None:
    assert list(disagreements(PROJECT, path.read_text())) == []


@pytest.mark.parametrize(
    ("pattern", "replacement", "fault"),
    [
        (r"^xxhash==.*\n", "", "xxhash is not locked"),
        (r"^xxhash==\S+", "xxhash==3.3.0", "xxhash 3.3.0 is not xxhash>=3.4.1"),
        (r"^numpy==\S+ ; python_full_version >= .*\n", "", "numpy is not locked where .*'3.14'.*"),
        (r"^rich==\S+", 'rich==15.0.0 ; sys_platform == "linux"', "rich is not locked where .*'darwin'.*"),
        (r"\Z", "left==1.0  # via int8cli (pyproject.toml)\n", "left 1.0 is locked as named in pyproject.toml"),
        (r"\Z", "left==1.0  # via nobody\n", "left 1.0 is locked, and nothing locked needs it"),
        (r"^rich==(\S+)  # via .*", r"rich==\1  # via typer", r"rich .* is locked as not named in pyproject.toml"),
        (r"^hatchling==\S+", "hatchling==1.0", "hatchling 1.0 is not hatchling>=.*"),
    ],
)
def test_a_lock_that_does_not_match_pyproject_is_detected(pattern: str, replacement: str, fault: str) -> None:
    text, changes = re.subn(pattern, replacement, LOCKED.read_text(), flags=re.MULTILINE)
    assert changes == 1
    assert any(re.fullmatch(fault, line) for line in disagreements(PROJECT, text))


@pytest.mark.parametrize("where", ["dependencies", "calibrate", "plots", "clients", "build"])
def test_new_requirements_must_be_locked(where: str) -> None:
    project = read_project()
    lists = {
        **project["project"]["optional-dependencies"],
        **project["dependency-groups"],
        "dependencies": project["project"]["dependencies"],
        "build": project["build-system"]["requires"],
    }
    lists[where].append("new-package>=1")
    assert list(disagreements(project, LOCKED.read_text())) == ["new-package is not locked"]


@pytest.mark.parametrize("path", [LOCKED, OLDEST, VLLM], ids=lambda path: path.name)
def test_a_lock_contains_no_path_or_index(path: Path) -> None:
    """An index, host, path or local build would be useless on another machine."""
    lines = [line.partition("# via ")[0] for line in path.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if re.search(r"[/@\\+]|--", line)] == []


@pytest.mark.parametrize("line", ["rich>=13", "rich", "rich @ file:///wheels/rich.whl", "rich==15.*", "rich==1,!=2"])
def test_a_line_that_is_not_one_version_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not one version of one package"):
        read_pins(line)


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """Except for packages that another package needs newer, and the tools that check the code."""
    oldest = {pin.name: pin for pin in read_pins(OLDEST.read_text())}
    for requirement in requirements(PROJECT):
        pin = oldest[canonicalize_name(requirement.name)]
        if pin.name not in held(PROJECT) and all(who.startswith(ASKED_FOR) for who in pin.via):
            assert pin.version in [Version(one.version) for one in requirement.specifier if one.operator == ">="]


def test_the_tools_have_the_same_versions_in_the_oldest_end() -> None:
    locked, oldest = (
        {pin.name: pin.version for pin in read_pins(path.read_text()) if pin.name in held(PROJECT)}
        for path in (LOCKED, OLDEST)
    )
    assert locked == oldest


def test_the_lock_of_vllm_has_what_its_tests_ask_for_and_the_torch_of_the_others() -> None:
    pins = {pin.name: pin.version for pin in read_pins(VLLM.read_text())}
    calibrate = PROJECT["project"]["optional-dependencies"]["calibrate"]
    asked = [*map(Requirement, (*PROJECT["project"]["dependencies"], *calibrate)), *group(PROJECT, "vllm")]
    for requirement in asked:
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier
    assert f"torch=={pins['torch']}" in constraints("locked", torch=None)
    assert "torchvision" in pins
    assert not pins.keys() & {"torchaudio", "torchcodec"}


def test_the_newest_end_pins_torch_and_the_tools() -> None:
    names = {line.partition("==")[0] for line in constraints("newest", torch=None)}
    assert names == held(PROJECT) | {"torch"}


def test_a_given_torch_version_replaces_the_locked_one() -> None:
    for end in ("locked", "oldest", "newest"):
        torch = [line for line in constraints(end, torch="2.99") if line.startswith("torch=")]
        assert torch == ["torch==2.99"]
    assert torch_line("oldest") != torch_line(None) != torch_line("newest") == []


def test_changed_versions_are_listed_with_old_and_new() -> None:
    before, after = read_pins("left==1.0\nstays==1.0\nup==1.0"), read_pins("new==3.0\nstays==1.0\nup==2.0")
    assert moved(before, after) == ["  left 1.0 -> -", "  new - -> 3.0", "  up 1.0 -> 2.0"]


def test_the_workflow_runs_every_python_that_the_package_is_declared_for() -> None:
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    listed = re.search(r"python: \[(.*)\]", workflow)
    assert listed
    assert re.findall(r"3\.\d+", listed[1]) == pythons(PROJECT)


def test_only_a_python_that_the_lock_files_are_for_is_taken(tmp_path: Path) -> None:
    assert [f"{major}.{minor}" for major, minor in declared(PYPROJECT.read_text())] == pythons(PROJECT)
    script = tmp_path / "scripts" / "check_python.py"
    script.parent.mkdir()
    script.write_text((ROOT / "scripts" / "check_python.py").read_text())
    here = "{}.{}".format(*sys.version_info)
    for declares, code in ((here, 0), ("3.99", 1)):
        (tmp_path / "pyproject.toml").write_text(f'"Programming Language :: Python :: {declares}"')
        done = subprocess.run([sys.executable, script], capture_output=True, text=True)
        assert done.returncode == code
        assert ("is Python" in done.stderr) == bool(code)
