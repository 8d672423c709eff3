"""The hints of a command name only options that the command has."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from int8cli import errors
from int8cli.cli import app, hints
from int8cli.cli.errors import flag_of, hint_for
from int8cli.model.memory import too_little_memory

HINTS = {
    "convert": hints.CONVERT,
    "dequantize": hints.DEQUANTIZE,
    "estimate-memory": hints.ESTIMATE_MEMORY,
    "evaluate": hints.EVALUATE,
    "generate": hints.GENERATE,
    "inspect-outliers": hints.INSPECT_OUTLIERS,
    "push": hints.PUSH,
    "report": hints.REPORT,
    "status": hints.STATUS,
    "env": hints.ENV,
    "verify": hints.VERIFY,
}
COMMANDS: dict[str, Any] = vars(typer.main.get_command(app))["commands"]


def kinds(base: type[errors.Int8cliError] = errors.Int8cliError) -> Iterator[type[errors.Int8cliError]]:
    """Every class of error that the library raises but those of options, which are usage errors."""
    if base is not errors.OptionError:
        yield base
        for kind in base.__subclasses__():
            yield from kinds(kind)


def options_of(command: str) -> set[str]:
    return {flag for parameter in COMMANDS[command].params for flag in (*parameter.opts, *parameter.secondary_opts)}


def named_options(command: str, hint: str) -> Iterator[tuple[str, str]]:
    """Each option in a hint and the command it belongs to: after `int8cli NAME`, until the sentence ends, that one."""
    for sentence in hint.split(". "):
        other = re.search(r"int8cli ([a-z-]+)", sentence)
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", sentence):
            yield other[1] if other else command, flag


def test_there_are_hints_for_every_command() -> None:
    assert set(HINTS) == set(COMMANDS)


@pytest.mark.parametrize("command", HINTS)
def test_hinted_options_exist_in_the_command(command: str) -> None:
    found = 0
    for kind in kinds():
        for owner, flag in named_options(command, hint_for(kind("it failed", hint="Try."), HINTS[command])):
            assert flag in options_of(owner), f"{command}, {kind.__name__}: {flag}"
            found += 1
    assert found or not HINTS[command]


def test_an_option_that_does_not_exist_would_be_found() -> None:
    assert list(named_options("verify", "Try --this. int8cli convert --that makes it.")) == [
        ("verify", "--this"),
        ("convert", "--that"),
    ]
    assert "--from" not in options_of("convert")


def test_the_hint_of_the_nearest_class_follows_the_errors_own_hint() -> None:
    own = hint_for(errors.DiskSpaceError("full", hint="Make room."), hints.CONVERT)
    assert own == "Make room. --output DIR can be on another disk."
    assert hint_for(errors.PlaceError("no"), hints.CONVERT) == "--output DIR names another directory."
    assert hint_for(errors.OutputError("no", hint="Mend it."), hints.CONVERT) == "Mend it."
    assert hint_for(errors.SourceError("no", hint="Look."), hints.CONVERT) == "Look."


@pytest.mark.parametrize("command", ["convert", "evaluate", "generate", "inspect-outliers"])
def test_only_where_a_gpu_has_too_little_memory_the_cpu_would_do(command: str) -> None:
    assert "--device cpu" in hint_for(too_little_memory("cuda", "full", ""), HINTS[command])
    assert "--device" not in hint_for(too_little_memory("cpu", "full", ""), HINTS[command])
    assert "--device" not in hint_for(errors.MemoryRefusedError("no"), HINTS[command])


@pytest.mark.parametrize("option", ["on_nonfinite", "outliers", "threshold"])
def test_an_option_is_named_as_the_command_line_writes_it(option: str) -> None:
    assert flag_of(option) in options_of("convert")
