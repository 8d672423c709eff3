"""Standard streams that are closed or cannot be written: messages stop no work, and a lost result is an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.program import CLOSED, CONVERT, UNREAD, Nursery, environment, llama, tree

FULL = "/dev/full"
GONE = [CLOSED, FULL, UNREAD]


@pytest.fixture(scope="module")
def model(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = llama(tmp_path_factory.mktemp("source") / "model", layers=1)
    assert nursery.run(*CONVERT, "model", "-o", "right", cwd=directory.parent).code == 0
    return directory


@pytest.mark.parametrize("gone", GONE)
def test_messages_that_cannot_be_written_change_nothing(
    gone: str, model: Path, nursery: Nursery, tmp_path: Path
) -> None:
    ended = nursery.run(*CONVERT, model, "-o", "out", "--json", cwd=tmp_path, stderr=gone)
    assert ended.code == 0
    assert ended.out.startswith("{")
    assert tree(tmp_path / "out") == tree(model.parent / "right")


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("command", [[*CONVERT, "model", "-o", "out"], ["status", "right"], ["--help"]], ids=str)
def test_a_result_that_cannot_be_written_is_an_error(
    command: list[str], gone: str, model: Path, nursery: Nursery
) -> None:
    ended = nursery.run(*command, cwd=model.parent, stdout=gone)
    assert ended.code == 1
    assert "Traceback" not in ended.err
    # A reader that goes away has seen what it wanted to see.
    assert ended.err.count("error: the result cannot be written to standard output") == (gone != UNREAD)
    if command[0] == "convert":
        assert tree(model.parent / "out") == tree(model.parent / "right")


@pytest.mark.parametrize("gone", GONE)
def test_a_command_without_a_result_needs_no_stdout(gone: str, model: Path, nursery: Nursery, tmp_path: Path) -> None:
    assert nursery.run(*CONVERT, model, "-o", "out", "-q", cwd=tmp_path, stdout=gone).code == 0


@pytest.mark.parametrize("gone", GONE)
def test_a_wrong_option_is_exit_code_2_whoever_hears_of_it(gone: str, model: Path, nursery: Nursery) -> None:
    ended = nursery.run(*CONVERT, "model", "--no-such-option", cwd=model.parent, stderr=gone)
    assert (ended.code, ended.out) == (2, "")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library writes to descriptor 2 would go into that file."""
    program = (
        "import os\n"
        "os.closerange(0, 3)\n"
        "from int8cli.cli.streams import prepare_streams\n"
        "prepare_streams()\n"
        f"number = os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "os.write(number, b'%d' % number)\n"
        "os.write(2, b'a message')\n"
        "os.system('echo another >&2')\n"
    )
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)
    assert int((tmp_path / "file").read_text()) > 2


def test_files_are_the_same_where_all_streams_are_closed(model: Path, tmp_path: Path) -> None:
    """A process that really starts so, with a worker that inherits its streams."""
    command = f'exec "{sys.executable}" -m int8cli convert "$1" --outliers none -o out -q --workers 2 <&- >&- 2>&-'
    ended = subprocess.run(["sh", "-c", command, "sh", os.fspath(model)], cwd=tmp_path, env=environment())
    assert ended.returncode == 0
    assert tree(tmp_path / "out") == tree(model.parent / "right")
