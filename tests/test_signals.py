"""SIGTERM and SIGHUP end a run cleanly, with a message, and the next run resumes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.program import environment, llama, outcome_of, run, start, tree, wait_until


@pytest.fixture(autouse=True)
def hang_up_by_default() -> Iterator[None]:
    """The suite may run under nohup, which children would inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose shards take long enough for a signal to land inside one."""
    directory = tmp_path_factory.mktemp("large") / "model"
    return llama(directory, layers=6, hidden=768, intermediate=2048, vocabulary=2048, shards=6)


@pytest.fixture(scope="module")
def reference(large: Path) -> dict[str, bytes]:
    """What an unbroken run writes."""
    assert run("convert", large, "-o", "reference", "-q", cwd=large.parent).code == 0
    return tree(large.parent / "reference")


def is_at_work(output: Path) -> bool:
    return any((output / "int8/partial").glob("*"))


def group_exists(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["alone", "to all"])
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["TERM", "HUP"])
def test_a_signal_ends_a_run_cleanly_and_the_next_run_resumes(
    number: signal.Signals, workers: str, send, large: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start("convert", large, "-o", output, "--workers", workers, cwd=tmp_path)
    wait_until(lambda: is_at_work(output))
    send(process.pid, number)
    outcome = outcome_of(process)
    assert (outcome.code, outcome.out) == (128 + number, ""), outcome.err
    assert "Traceback" not in outcome.err
    assert f"{number.name}: run the same command again to resume" in outcome.err
    wait_until(lambda: not group_exists(process.pid), "the end of the last child")
    assert not (output / "config.json").exists()
    assert run("convert", large, "-o", output, "-q", cwd=tmp_path).code == 0
    assert tree(output) == reference


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["TERM", "HUP"])
def test_a_signal_while_workers_start_gives_no_traceback(number: signal.Signals, large: Path, tmp_path: Path) -> None:
    process = start("convert", large, "-o", "out", "--workers", "2", cwd=tmp_path)
    wait_until(lambda: (tmp_path / "out/LICENSE").exists())
    os.killpg(process.pid, number)
    outcome = outcome_of(process)
    assert outcome.code == 128 + number, outcome.err
    assert "Traceback" not in outcome.err
    wait_until(lambda: not group_exists(process.pid), "the end of the last child")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_under_nohup_a_hang_up_is_ignored(
    workers: str, large: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the program inherits it, as from nohup
    try:
        process = start("convert", large, "-o", output, "-q", "--workers", workers, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until(lambda: is_at_work(output))
    os.killpg(process.pid, signal.SIGHUP)
    assert outcome_of(process).code == 0
    assert tree(output) == reference


def test_the_library_does_not_change_signal_handlers(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    program = (
        "import signal, int8cli; from int8cli import ConvertOptions\n"
        "before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]\n"
        f"int8cli.convert({str(model)!r}, 'out', ConvertOptions(outliers='none', workers=2))\n"
        "assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, check=True, timeout=120)


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP"), (signal.SIGINT, "interrupted")]
)
def test_a_run_ends_while_it_is_deep_in_a_library(number: signal.Signals, said: str) -> None:
    """As in the product of a large layer: the main thread hears of nothing before that is done, here in an hour."""
    program = (
        "import hashlib, threading\nfrom int8cli.cli.signals import end_on_signals\nend_on_signals()\n"
        "threading.Timer(0.5, lambda: print('ready', flush=True)).start()\n"  # the main thread is in there by then
        "hashlib.pbkdf2_hmac('sha256', b'', b'', (1 << 31) - 1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert err == f"\n{said}: run the same command again\n"


# Runs the program, which gets a signal while it parses its options.
SIGNAL_WHILE_PARSING = """
import os, signal, sys
import typer.core
from int8cli.cli import main

parse = typer.core.TyperCommand.parse_args

def parse_args(command, context, arguments):
    os.kill(os.getpid(), int(sys.argv.pop()))
    return parse(command, context, arguments)

typer.core.TyperCommand.parse_args = parse_args
main()
"""


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")],
    ids=["INT", "TERM", "HUP"],
)
def test_a_signal_outside_of_a_command_has_the_same_message_and_exit_code(
    number: signal.Signals, name: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_WHILE_PARSING, "status", "out", str(int(number))],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == f"\n{name}: run the same command again\n"
