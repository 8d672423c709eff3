"""Worker processes: tasks, reports, imports, and what they never run."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.calibration_models import make_model
from support.program import environment, llama, run

from int8cli import ConvertOptions, convert
from int8cli.conversion import WORKER_PRELOAD
from int8cli.workers.processes import Executor, InlineExecutor, OnBytes, ProcessExecutor, StoppedError

Told = list[tuple[str, str, int]]


def tell(on_bytes: OnBytes) -> int:
    on_bytes("shard", "first", 3)
    on_bytes("shard", "second", 0)
    on_bytes("shard", "third", 4)
    return os.getpid()


def ask_for_ever(on_bytes: OnBytes) -> None:
    on_bytes("shard", "begun", 1)
    while True:
        on_bytes("shard", "", 0)


@pytest.fixture
def in_a_process(tmp_path: Path) -> Iterator[Callable[[OnBytes], Executor]]:
    """Makes an executor of one process."""
    lock = os.open(tmp_path, os.O_RDONLY)
    yield lambda on_bytes: ProcessExecutor(1, lock, on_bytes, WORKER_PRELOAD)
    os.close(lock)


def test_a_task_tells_of_bytes_and_not_of_none(in_a_process: Callable[[OnBytes], Executor]) -> None:
    for make in (InlineExecutor, in_a_process):
        told: Told = []
        executor = make(lambda *report, told=told: told.append(report))
        pid = executor.submit(tell).result()
        executor.close()
        assert (pid == os.getpid()) == (make is InlineExecutor)
        assert told == [("shard", "first", 3), ("shard", "third", 4)]


@pytest.mark.parametrize("error", [EOFError, ConnectionRefusedError, BrokenPipeError])
def test_a_server_that_has_ended_breaks_the_executor(
    error: type[Exception], in_a_process: Callable[[OnBytes], Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(descriptors: object) -> None:
        raise error

    monkeypatch.setattr(forkserver, "connect_to_new_process", gone)
    executor = in_a_process(lambda *report: None)
    with pytest.raises(BrokenExecutor):
        executor.submit(tell)
    executor.close()


def test_a_task_that_only_asks_is_stopped(in_a_process: Callable[[OnBytes], Executor]) -> None:
    begun = threading.Event()
    executor = in_a_process(lambda *report: begun.set())
    future = executor.submit(ask_for_ever)
    assert begun.wait(60)
    executor.close()
    assert isinstance(future.exception(), StoppedError)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked from a server on Linux only")
def test_a_worker_that_ends_while_it_starts_breaks_the_executor(
    in_a_process: Callable[[OnBytes], Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent reads a new worker's number from a pipe, which ends early if the fork server is killed."""
    read_number = forkserver.read_signed  # type: ignore[attr-defined]

    def killed(pipe: int) -> int:
        os.kill(read_number(pipe), signal.SIGKILL)
        raise EOFError

    monkeypatch.setattr(forkserver, "read_signed", killed)
    executor = in_a_process(lambda *report: None)
    with pytest.raises(BrokenExecutor):
        executor.submit(tell)
    executor.close()


@dataclass
class TwoSlots:
    """An executor with two slots that records the number of threads of each shard."""

    threads: list[int] = field(default_factory=list)
    slots = 2

    def submit(self, task: Any) -> Any:
        self.threads.append(task.args[0].options.threads)
        return InlineExecutor(lambda *report: None).submit(task)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("rows", "threads"),
    [((9000, 2000, 2000), [3, 1, 4]), ((10, 3000, 3000), [1, 2, 4]), ((10, 9000, 10), [1, 4, 4])],
    ids=["a large one", "two alike", "one that is all"],
)
def test_shards_have_threads_by_their_part_of_the_work(
    rows: tuple[int, ...], threads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two run at the same time and finish before the third, which gets all threads."""
    source = tmp_path / "source"
    source.mkdir()
    weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(count, 8) for i, count in enumerate(rows)}
    index = {}
    for number, (name, weight) in enumerate(weights.items(), start=1):
        index[name] = f"model-{number:05}-of-{len(rows):05}.safetensors"
        save_file({name: weight}, source / index[name])
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    executor = TwoSlots()
    monkeypatch.setattr("int8cli.conversion.convert.executor_for", lambda *_: executor)
    convert(source, tmp_path / "out", ConvertOptions(outliers="none", workers=2, threads=2))
    assert executor.threads == threads


# The parent process

AT_THE_END = """
import multiprocessing.forkserver, sys
if {hidden!r}: sys.modules[{hidden!r}] = None
from int8cli.cli import app
try: app({arguments!r})
except SystemExit as ending: print({asked}, ending.code or 0)
"""


def at_the_end(asked: str, *arguments: str | Path, cwd: Path, hidden: str = "") -> list[str]:
    """What holds when the program has run, and its exit code. The module `hidden` cannot be imported."""
    code = AT_THE_END.format(hidden=hidden, arguments=[*map(str, arguments)], asked=asked)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment(), stdout=subprocess.PIPE, text=True)
    return done.stdout.split()[-2:]


TORCH = "'torch' in sys.modules"


@pytest.mark.parametrize("outliers", ["none", "weights", "auto"])
def test_the_process_that_distributes_shards_needs_no_torch(outliers: str, tmp_path: Path) -> None:
    command = ("convert", llama(tmp_path / "model"), "-q", "--outliers", outliers)  # there is no tokenizer
    assert at_the_end(TORCH, *command, "-o", "two", "--workers", "2", cwd=tmp_path) == ["False", "0"]
    assert (tmp_path / "two/int8/outliers").exists() == (outliers != "none")


def test_without_transformers_auto_needs_no_torch_either(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", max_shard_size="30KB")
    command = ("convert", model, "-q", "--workers", "2", "-o", "out")
    assert at_the_end(TORCH, *command, cwd=tmp_path, hidden="transformers") == ["False", "0"]
    assert (tmp_path / "out/int8/outliers").exists()


def test_one_worker_is_the_process_itself(tmp_path: Path) -> None:
    command = ("convert", llama(tmp_path / "model"), "-q", "-o", "out", "--workers", "1", "--outliers", "weights")
    assert at_the_end(TORCH, *command, cwd=tmp_path) == ["True", "0"]


SERVER = "multiprocessing.forkserver._forkserver._forkserver_pid is not None"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no server")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--workers", "2", "--outliers", "weights"], True),
        (["--workers", "2", "--outliers", "activations"], False),
        (["--workers", "1", "--outliers", "weights"], False),
        (["--outliers", "weights"], False),
    ],
)
def test_the_server_starts_early_if_workers_are_expected(options: list[str], expected: bool, tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    (model / "config.json").write_text("no JSON")  # the end comes before any task
    assert at_the_end(SERVER, "convert", model, "-o", "out", *options, cwd=tmp_path) == [str(expected), "1"]


# What is never run


def test_nothing_in_the_working_directory_is_run(tmp_path: Path) -> None:
    """Nor the script that calls the program, a second time: this one would convert again."""
    model = llama(tmp_path / "model")
    for name in ("torch", "multiprocessing", "numpy", "int8cli"):
        (model / f"{name}.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'a').write({name!r})")
    script = tmp_path / "script.py"
    script.write_text("from int8cli.cli import main\nmain()\n")
    command = ("convert", ".", "-o", tmp_path / "out", "--workers", "2", "--outliers", "weights", "-q")
    done = subprocess.run(
        [sys.executable, script, *command], cwd=model, env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "was_run").exists()


def test_workers_start_where_the_path_of_tmpdir_is_too_long_for_a_socket(tmp_path: Path) -> None:
    llama(tmp_path / "model", layers=1, shards=2)
    long = tmp_path / ("long" * 30)
    long.mkdir()
    command = ("convert", "model", "--outliers", "none", "--workers", "2")
    outcome = run(*command, "-o", "out", cwd=tmp_path, env={"TMPDIR": str(long)})
    assert outcome.code == 0, outcome.err
    assert list(long.iterdir()) == []
