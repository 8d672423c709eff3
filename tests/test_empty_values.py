"""Every option and argument refuses an empty value, so that `-o "$UNSET"` does not write to the current directory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import int8cli
from int8cli.cli import app
from int8cli.errors import OptionError

COMMANDS: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
TEXTS = {"prompt"}  # what may be empty


def cases() -> Iterator[tuple[str, ...]]:
    """A command line for each option that takes a value and for each argument, with an empty value there."""
    for name, command in COMMANDS.items():
        places = [each for each in command.params if each.param_type_name == "argument" and each.name not in TEXTS]
        right = ["x"] * len(places)
        for index in range(len(places)):
            yield (name, *right[:index], "", *right[index + 1 :])
        for option in command.params:
            if option.param_type_name == "option" and not option.is_flag:
                yield from ((name, *right, flag, "") for flag in option.opts)
                yield (name, *right, f"{option.opts[0]}=")
                if option.multiple:
                    yield (name, *right, option.opts[0], "x", option.opts[0], "")


@pytest.mark.parametrize("words", [*cases()], ids=" ".join)
def test_an_empty_value_is_refused(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 2
    assert "it is empty" in ended.output
    assert not list(tmp_path.iterdir())


def test_all_options_are_tried() -> None:
    tried = {word for words in cases() for word in words}
    assert {
        "-o",
        "--output",
        "--methods",
        "--skip",
        "--work-dir",
        "--push-to",
        "--gpu",
        "--text",
        "--revision",
    } <= tried


def test_a_list_of_nothing_names_no_method() -> None:
    ended = CliRunner().invoke(app, ["evaluate", "x", "--methods", " , "])
    assert ended.exit_code == 2
    assert "names no method" in ended.output


@pytest.mark.parametrize(
    ("output", "words"),
    [("", "empty"), ("a\0b", "null byte"), ("s3://bucket/m", "address"), (Path("gs://b/m"), "address")],
)
def test_the_library_refuses_an_output_that_is_no_directory(output: str | Path, words: str) -> None:
    for call in (int8cli.convert, int8cli.plan_conversion, int8cli.dequantize):
        with pytest.raises(OptionError, match=words) as caught:
            call("x", output)
        assert caught.value.option == "output"
