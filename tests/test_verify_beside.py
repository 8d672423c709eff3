"""The loader in its own process: the same result, no torch in the program, and an end with the program."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.checkpoints import WITHOUT_COLUMNS
from support.program import ROOT, environment, llama, outcome_of, run, start, wait_until
from support.verifying import verified

from int8cli import convert


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verify-beside")
    convert(llama(directory / "source"), directory / "out", WITHOUT_COLUMNS)
    return directory / "out"


def has_imported(pid: int, library: str) -> bool:
    try:
        return library in Path(f"/proc/{pid}/maps").read_text()
    except FileNotFoundError:
        return False


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def amid_its_imports(out: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The program, and its loader's process while that imports torch; what is left of them is killed in the end."""
    process = start("verify", out, cwd=out.parent)
    try:
        wait_until(lambda: any(has_imported(child, "libtorch") for child in children_of(process.pid)), "an import")
        yield process, children_of(process.pid)[0]
    finally:
        process.kill()
        process.communicate()


def imported_by(out: Path, *, absent: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """The document of `verify` in a new interpreter, and which large packages that has imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "from int8cli.cli import app\n"
        f"try: app(['verify', {str(out)!r}, '--json', '--quiet'])\n"
        "except SystemExit as ending: assert ending.code == 0\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if sys.modules.get(name)], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(), cwd=out.parent
    )
    return result.stdout, json.loads(result.stderr.replace("'", '"'))


def test_the_result_equals_that_of_an_in_process_check_without_torch(out: Path) -> None:
    document, imported = imported_by(out)
    assert imported == []
    assert json.loads(document) == json.loads(json.dumps(verified(out).to_json()))


def test_without_transformers_torch_is_not_imported(out: Path) -> None:
    document, imported = imported_by(out, absent=("transformers", "torch"))
    assert imported == []
    loads = json.loads(document)["checks"][-1]
    assert (loads["status"], loads["detail"]) == ("not checked", "needs transformers, which is not installed")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A directory to import from, with a transformers that cannot be imported."""
    directory = tmp_path / "broken"
    directory.mkdir()
    (directory / "transformers.py").write_text("print('noise')\nraise ImportError('tokenizers is too old')\n")
    return directory


def test_a_broken_transformers_is_not_a_failure_of_the_model(out: Path, broken: Path) -> None:
    outcome = run("verify", out, "--json", "-q", cwd=out.parent, env={"PYTHONPATH": f"{broken}:{ROOT}"})
    assert (outcome.code, outcome.err) == (0, "")
    loads = json.loads(outcome.out)["checks"][-1]
    why = "transformers cannot be imported here: ImportError: tokenizers is too old"
    assert (loads["status"], loads["detail"]) == ("not checked", why)


def test_no_file_in_the_working_directory_is_run(out: Path, broken: Path, tmp_path: Path) -> None:
    for name in ("int8cli", "transformers", "torch", "pickle", "threading"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('foreign code ran')\n")
    code = (
        "import sys; sys.path.remove('')  # as the installed program has it\n"
        f"from int8cli.cli import app; app(['verify', {str(out)!r}, '--json', '--quiet'])"
    )
    settings = environment(PYTHONPATH=f"{broken}:{ROOT}")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "tokenizers is too old" in json.loads(result.stdout)["checks"][-1]["detail"]


@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["from a terminal", "to the program alone"])
def test_an_interrupt_during_an_import_ends_both_processes_at_once(send: Callable[[int, int], None], out: Path) -> None:
    with amid_its_imports(out) as (process, loader):
        send(process.pid, signal.SIGINT)
        outcome = outcome_of(process)
        assert not is_running(loader)
    assert (outcome.code, outcome.out) == (130, "")
    assert "Traceback" not in outcome.err
    assert "interrupted: run the same command again\n" in outcome.err


def test_the_loader_ends_when_the_program_is_killed(out: Path) -> None:
    with amid_its_imports(out) as (process, loader):
        process.kill()
        wait_until(lambda: not is_running(loader), "the end of the loader")


def test_a_loader_that_is_killed_is_a_failure(out: Path) -> None:
    with amid_its_imports(out) as (process, loader):
        os.kill(loader, signal.SIGKILL)
        outcome = outcome_of(process)
    assert outcome.code == 1
    assert "the loader crashed its process: SIGKILL" in outcome.out
    assert "FAILED: loads." in outcome.out


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        ("import os; os.abort()", "could not be made: the loader's process ended with SIGABRT"),
        ("import os; os._exit(127)", "could not be made: the loader's process ended with exit code 127"),
        ("raise SystemError('error return without exception set')", "could not be made: Python failed inside"),
        ("raise ImportError('libtorch.so: failed to map segment from shared object')", "a library cannot be loaded"),
    ],
)
def test_a_loader_without_memory_says_nothing_about_the_model(ends: str, shown: str, out: Path, tmp_path: Path) -> None:
    """Measured with limits of 350 to 850 MB: each of these ends of the import of torch or transformers."""
    (tmp_path / "transformers.py").write_text(f"{ends}\n")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40,) * 2)\n"
        f"from int8cli.cli import app; app(['verify', {str(out)!r}, '-q'])"
    )
    settings = environment(PYTHONPATH=f"{tmp_path}:{ROOT}", COLUMNS="300")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings)
    assert result.returncode == 1
    assert shown in result.stderr
    assert "hint: " in result.stderr
    assert "FAILED" not in result.stdout
