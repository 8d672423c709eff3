"""Names from a checkpoint on the terminal: nothing but printable characters, broken where a reader would."""

import pytest

from int8cli.report.text import broken_at_dots, printable
from int8cli.results.units import counted, human_bytes


def test_control_characters_are_written_out() -> None:
    assert printable("a\n\x1b[31mred\u202e\ud800é") == r"a\n\x1b[31mred\u202e\ud800é"


def test_long_names_are_broken_after_dots() -> None:
    name = "model.layers.*.block_sparse_moe.experts.*.gate_proj"
    lines = broken_at_dots(name, 32).split("\n")
    assert lines == ["model.layers.*.block_sparse_moe.", "experts.*.gate_proj"]
    assert max(map(len, lines)) <= 32


def test_a_name_without_dots_is_broken_where_it_must() -> None:
    assert broken_at_dots("x" * 70, 32).split("\n") == ["x" * 32, "x" * 32, "x" * 6]


def test_names_are_no_markup() -> None:
    assert broken_at_dots("[red]", 32) == r"\[red]"


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (53_084_160, "53.1 MB"),
        (352_494_542_848, "352 GB"),
    ],
)
def test_bytes_are_shown_with_three_digits(count: int, shown: str) -> None:
    assert human_bytes(count) == shown


def test_one_is_no_plural() -> None:
    assert (counted(1, "layer"), counted(1234, "layer")) == ("1 layer", "1,234 layers")
