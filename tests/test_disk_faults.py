"""Failures of the disk and of limits: each is an error of ours, no file is half-written, and the next run resumes."""

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration_models import WORDS, make_model
from support.program import ROOT, llama, tree

from int8cli import ConvertOptions, EstimateOptions, InspectOptions, convert, estimate_memory, inspect_outliers, verify
from int8cli.checkpoint.disk import system_errors
from int8cli.commands.options import VerifyOptions
from int8cli.errors import (
    DiskSpaceError,
    Int8cliError,
    NotEnoughMemoryError,
    OutputError,
    SystemRefusalError,
)
from int8cli.model.saved_states import SavedStates
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.outliers.statistics_file import load_statistics, save_statistics

PLAIN = ConvertOptions(outliers="none", workers=1, threads=1)
CALLS = ["open", "fstat", "preadv", "pwrite", "fsync", "replace", "mkdir", "unlink", "posix_fallocate", "stat", "close"]
NUMBERS = [errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EROFS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("source") / "model", layers=1)


@pytest.fixture(scope="module")
def reference(model: Path) -> dict[str, bytes]:
    convert(model, model.parent / "reference", PLAIN)
    return tree(model.parent / "reference")


class Fault:
    """The call of a function of `os`, of those that concern some directories, that fails."""

    def __init__(self, nth: int, number: int) -> None:
        self.nth, self.number, self.calls = nth, number, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.nth:
                if function is os_close:  # as Linux does: it is closed, whatever it says
                    function(*args, **options)
                raise OSError(self.number, os.strerror(self.number))
            return function(*args, **options)

        return failing


os_close = os.close


@contextmanager
def failing(call: str, fault: Fault) -> Iterator[None]:
    right = getattr(os, call)
    setattr(os, call, fault.around(right))
    try:
        yield
    finally:
        setattr(os, call, right)


@pytest.mark.parametrize("call", CALLS)
def test_a_system_call_that_fails_is_an_error_of_ours(
    call: str, model: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    """Every few calls of a conversion in turn, each with another errno; then a run without faults goes on."""
    output, nth, reached = tmp_path / "out", 1, True
    while reached:
        fault = Fault(nth, NUMBERS[nth % len(NUMBERS)])
        with failing(call, fault), suppress(Int8cliError):
            convert(model, output, PLAIN)
        reached = fault.calls >= nth
        for name, data in tree(output).items() if output.exists() else ():
            aside = name.startswith("int8/partial/") or Path(name).name.startswith(".") or name.endswith("/")
            assert aside or data == reference[name], f"{name} is not whole after call {nth} of {call}"
        nth += 1 + nth // 4
    convert(model, output, PLAIN)
    assert tree(output) == reference


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_reported(
    number: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(OutputError, match="a second run on it could not be prevented"):
        convert(model, tmp_path / "out", PLAIN)


def test_reading_a_config_that_the_disk_does_not_give(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from int8cli.checkpoint import reader

    class Broken(reader._CheckedFile):
        def readinto(self, buffer: Any, /) -> int:
            with reader.reading_errors(self._path, self._display_name):
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(reader, "_CheckedFile", Broken)
    with pytest.raises(Int8cliError, match="cannot be read: Input/output error"):
        estimate_memory(str(model), EstimateOptions())


def test_out_of_memory_errors_become_int8cli_errors(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("int8cli.checkpoint.directory.open_to_read", greedy)
    with pytest.raises(NotEnoughMemoryError):
        estimate_memory(str(model), EstimateOptions())


def test_a_block_is_on_the_disk_before_the_record_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power failure leaves a record of outputs that are zeros, which no reader of them notices."""
    synced: list[str] = []
    right = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        right(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    states = SavedStates(tmp_path / "blocks", {"run": 1})
    for sequence in range(2):
        states.put("layers", "0", 1, sequence, torch.ones(4))
    states.finish("layers", "0", 1)
    states.close()
    record = synced.index(".record.json.partial")
    assert sorted(synced[:record]) == ["0.pt", "0@1", "1.pt"]


def test_a_full_disk_between_blocks_is_reported(tmp_path: Path) -> None:
    states = SavedStates(tmp_path / "blocks", {"run": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(DiskSpaceError):
            states.put("layers", "0", 1, 0, torch.zeros(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    states.put("layers", "0", 1, 0, torch.ones(1 << 10))
    states.finish("layers", "0", 1)
    assert torch.equal(states.get("layers", 0), torch.ones(1 << 10))
    states.close()


@pytest.mark.parametrize("limit", [3, 5, 12, 16, 20, 40])
def test_few_descriptors_are_no_traceback(limit: int, model: Path, tmp_path: Path) -> None:
    program = (
        "import resource; from int8cli.__main__ import main; import sys\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
        f"sys.argv = ['int8cli', 'convert', {str(model)!r}, '-o', 'out', '--outliers', 'none', '--workers', '2']\n"
        "main()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, timeout=120)
    assert ended.returncode in (0, 1), ended.stderr.decode()
    assert b"Traceback" not in ended.stderr, ended.stderr.decode()


# Imports of this module fail with this error, as all do where the system gives no memory or no more descriptors.
REFUSED = """
import sys
from importlib.abc import MetaPathFinder

class Refuses(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            raise {error}

sys.meta_path.insert(0, Refuses())
sys.argv = ["int8cli", "estimate-memory", "./model"]
from int8cli.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "int8cli.cli.push", "pydantic_core"])  # the last while options are parsed
@pytest.mark.parametrize("error", ["MemoryError", "ImportError('failed to map segment', path='x.so')"])
def test_a_program_that_cannot_be_loaded_is_no_traceback(module: str, error: str, tmp_path: Path) -> None:
    program = REFUSED.format(module=module, error=error)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, timeout=120)
    assert ended.returncode == 1, ended.stderr.decode()
    assert ended.stderr.startswith(b"error: "), ended.stderr.decode()
    assert b"\nhint: " in ended.stderr
    assert b"Traceback" not in ended.stderr, ended.stderr.decode()


def test_a_thread_that_is_refused_is_an_error(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> int:
        raise RuntimeError("can't start new thread")

    for name in ("_start_new_thread", "_start_joinable_thread"):  # the second from Python 3.13 on
        if hasattr(threading, name):
            monkeypatch.setattr(threading, name, refuse)
    for run in (lambda: convert(model, tmp_path / "out", PLAIN), lambda: estimate_memory(model)):
        with pytest.raises(SystemRefusalError, match="another thread"):
            run()


@pytest.mark.parametrize("name", ["n" * 300, "~nobody-of-this-name/m", "loop"])
def test_a_path_that_cannot_exist_is_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(Int8cliError):
        convert(f"./{name}" if name != "~nobody-of-this-name/m" else name, options=PLAIN)


@pytest.mark.parametrize("output", ["n" * 300, "file/out", "loop/out"])
def test_an_output_path_that_cannot_exist_is_an_error(output: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for run in (lambda: convert(model, tmp_path / output, PLAIN), lambda: verify(tmp_path / output, VerifyOptions())):
        with pytest.raises(Int8cliError):
            run()


def test_a_library_that_does_not_fit_under_a_memory_limit_is_reported() -> None:
    loading = ImportError("libx.so: failed to map segment from shared object", path="/site/x.cpython-311.so")
    wrapped = ImportError("advice")
    wrapped.__cause__ = loading
    for error in (loading, wrapped):
        with pytest.raises(SystemRefusalError, match=r"/site/x\.cpython-311\.so cannot be loaded"), system_errors():
            raise error
    with pytest.raises(ImportError), system_errors():  # a bug keeps its traceback
        raise ImportError("cannot import name", path="/site/x.py")


def test_a_directory_whose_name_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names on Linux are bytes; Python, torch and safetensors each have their own opinion of those that are no text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"))
    source = Path(shutil.copytree(make_model("llama", tmp_path / "m"), strange))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 3))
    options = ConvertOptions(outliers="activations", text=text, tokens=64, workers=1)
    convert(source, Path(f"{strange}-int8"), options)
    convert(tmp_path / "m", tmp_path / "right", options)
    assert verify(Path(f"{strange}-int8"), VerifyOptions()).passed
    name = "model.safetensors"
    assert Path(f"{strange}-int8/{name}").read_bytes() == (tmp_path / "right" / name).read_bytes()
    statistics = strange / "statistics\udcff.safetensors"
    found = inspect_outliers(source, InspectOptions(text=text, tokens=64))
    assert isinstance(found, OutlierStatistics)
    save_statistics(found, statistics)
    with pytest.raises(Int8cliError, match="is not a file of outlier statistics"):
        load_statistics(statistics)
