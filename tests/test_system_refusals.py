"""What the system refuses while a library works says nothing about the model: it is an error, and no other answer."""

import errno
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration_models import make_model, some_text

from int8cli import ConvertOptions, convert
from int8cli.checkpoint.disk import raise_if_of_the_system, system_errors
from int8cli.checkpoint.hub.ahead import FetchAhead
from int8cli.checkpoint.weights_only import load_weights
from int8cli.cli import main
from int8cli.errors import CannotRunError, Int8cliError, NotEnoughMemoryError, SourceError, SystemRefusalError
from int8cli.model.strands import Strand
from int8cli.model.text import load_tokenizer
from int8cli.runtime.reference import load_reference
from int8cli.verification.heads import heads_by_shape
from int8cli.verification.loads import check_loads

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."


def refused(number: int = errno.EMFILE) -> OSError:
    return OSError(number, os.strerror(number))


def wrapped() -> ValueError:
    error = ValueError("the config cannot be used")
    error.__cause__ = refused(errno.EIO)
    return error


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("refusals") / "model")


def test_torch_without_memory_is_an_error_of_ours() -> None:
    with pytest.raises(NotEnoughMemoryError) as caught, system_errors():
        raise RuntimeError(NO_MEMORY)
    assert caught.value.hint
    with pytest.raises(RuntimeError, match="a bug"), system_errors():
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (refused(), SystemRefusalError),
        (wrapped(), SystemRefusalError),
        (MemoryError(), NotEnoughMemoryError),
        (RuntimeError(NO_MEMORY), NotEnoughMemoryError),
        (OSError("libgomp.so.1: failed to map segment from shared object"), SystemRefusalError),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), SystemRefusalError),
        (SystemError("error return without exception set"), SystemRefusalError),
    ],
)
def test_errors_of_the_system_are_told_from_others(error: Exception, expected: type[Int8cliError]) -> None:
    with pytest.raises(expected) as caught:
        raise_if_of_the_system(error)
    assert caught.value.hint
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        OSError("no valid config"),
        FileNotFoundError(2, "x"),
        ConnectionRefusedError(111, "x"),
        ValueError(),
        RuntimeError(),
    ],
)
def test_other_errors_are_left_to_the_caller(error: Exception) -> None:
    raise_if_of_the_system(error)


@pytest.mark.parametrize("error", [refused(), wrapped()], ids=["plain", "wrapped"])
@pytest.mark.parametrize(
    "function",
    [
        "transformers.AutoConfig.from_pretrained",
        "transformers.AutoTokenizer.from_pretrained",
        "transformers.LlamaForCausalLM.__init__",
        "transformers.models.llama.modeling_llama.LlamaMLP.forward",
        "transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.forward",
    ],
)
def test_no_other_columns_are_stored_because_the_system_refused_a_call(
    error: Exception, function: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `auto`, a model that cannot run gets the columns that its weights suggest."""

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(function, refuse)
    (tmp_path / "words").write_text(some_text().text)
    options = ConvertOptions(outliers="auto", text=tmp_path / "words", tokens=16, workers=1)
    with pytest.raises(SystemRefusalError) as caught:
        convert(model, tmp_path / "out", options)
    assert caught.value.hint
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("transformers.AutoTokenizer.from_pretrained", load_tokenizer),
        ("transformers.LlamaForCausalLM.from_pretrained", lambda it: load_reference(str(it), torch.device("cpu"))),
    ],
)
def test_a_model_is_not_blamed_for_what_the_system_refuses(
    function: str, call: Callable[[Path], object], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise refused()

    monkeypatch.setattr(function, refuse)
    with pytest.raises(SystemRefusalError, match="Too many open files"):
        call(model)


class Refusing:
    """Finds no module: the system refuses to look."""

    def find_spec(self, *_: Any) -> None:
        raise refused(errno.EROFS)


def test_a_loader_that_the_system_does_not_let_be_imported_is_not_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    with pytest.raises(SystemRefusalError, match="Read-only file system"):
        check_loads(tmp_path, "bitsandbytes", [])


def test_a_head_is_not_overlooked_because_the_config_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise SourceError("config.json: cannot be read", hint="") from refused(errno.EIO)

    monkeypatch.setattr("int8cli.verification.heads.read_config", refuse)
    with pytest.raises(SystemRefusalError):
        list(heads_by_shape(tmp_path, []))


@pytest.mark.parametrize("begin", [lambda strand, _: strand.advance(), lambda _, ahead: ahead.start("file")])
def test_a_thread_that_is_refused_is_not_waited_for(
    begin: Callable[[Strand[int, int], FetchAhead], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error about it would hide what the system refused."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    strand, ahead = Strand[int, int](lambda ask: None), FetchAhead(lambda name: None, threading.Event())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        begin(strand, ahead)
    strand.close()
    ahead.close()


class PanicException(BaseException):  # as pyo3 names it
    """What a library written in Rust raises: no Exception."""


def panic(*_: Any, **__: Any) -> None:
    raise PanicException('called `Result::unwrap()` on an `Err` value: Os { code: 24, message: "Too many open files" }')


def test_a_library_that_panics_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemRefusalError, match=r"a library failed: .*Too many open files"), system_errors():
        panic()
    convert(model, tmp_path / "out", ConvertOptions(outliers="none", workers=1))
    monkeypatch.setattr("vl_convert.javascript_bundle", panic)
    monkeypatch.setattr("int8cli.cli.end_on_signals", lambda: None)  # it would end the process of the tests later
    monkeypatch.setattr("sys.argv", ["int8cli", "report", str(tmp_path / "out"), "-o", str(tmp_path / "page.html")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "error: a library failed" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_tokenizer_that_makes_its_library_panic_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(CannotRunError, match="the tokenizer cannot be loaded"):
        load_tokenizer(model)


def test_a_pickle_is_not_corrupt_because_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(NO_MEMORY)

    torch.save({"a": torch.ones(1)}, tmp_path / "a.bin")
    monkeypatch.setattr(torch, "load", refuse)
    with (tmp_path / "a.bin").open("rb") as file, pytest.raises(NotEnoughMemoryError):
        load_weights(file, "a.bin", "cpu")
