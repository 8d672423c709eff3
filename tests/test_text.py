"""Names from a checkpoint are only text, on the terminal and in HTML, Markdown and Python."""

import html
import io
from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.table import Table

from int8cli.report import markdown, markup
from int8cli.report.terminal import PrintingConsole, stdout_console, titled_table
from int8cli.report.text import PrintableStream, escape, printable
from int8cli.results.units import counted, human_bytes, told_apart


def test_control_characters_are_shown_as_escapes() -> None:
    assert printable("a\n\x1b[31mred\u202e\ud800é") == r"a\n\x1b[31mred\u202e\ud800é"


LONG_NAMES = ("model.layers.*.block_sparse_moe.experts.*.gate_proj", "x" * 170, "[a[/b]" * 9, "short")


def table() -> Table:
    made = titled_table("A title that is longer than the table beneath it")
    made.add_column("kind", no_wrap=True)
    made.add_column("size", justify="right", no_wrap=True)
    made.add_column("why")
    for name in LONG_NAMES:
        made.add_row(escape(name), "53.1 MB", "the reason, in as many words as it takes to say it")
    made.caption = "a caption of quite some words, which are to be read one after the other without a gap"
    return made


@pytest.mark.parametrize("width", [80, 120, 160])
def test_no_name_is_ever_broken_or_cut(width: int) -> None:
    file = io.StringIO()
    PrintingConsole(file=file, width=width, force_terminal=True, color_system=None).print_table(table())
    lines = file.getvalue().splitlines()
    for name in LONG_NAMES:
        assert [line for line in lines if line.split()[:3] == [name, "53.1", "MB"]], name


def test_a_table_takes_the_width_of_the_terminal_and_no_more() -> None:
    made = titled_table("")
    made.add_column("kind", no_wrap=True)
    made.add_column("why")
    made.add_row("name", "word " * 60)
    for width in (80, 120, 160):
        file = io.StringIO()
        PrintingConsole(file=file, width=width, force_terminal=True, color_system=None).print_table(made)
        longest = max(len(line.rstrip()) for line in file.getvalue().splitlines())
        assert width - 6 < longest <= width


def test_nothing_is_wrapped_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    stdout_console().print_table(table())
    assert len(capsys.readouterr().out.splitlines()) == 1 + 1 + len(LONG_NAMES) + 1  # title, header, rows, caption


def shown(text: str, **options: Any) -> str:
    """What a console of ours writes for rich markup."""
    file = io.StringIO()
    PrintingConsole(file=file, width=200, emoji=False, highlight=False, **options).print(text, soft_wrap=True)
    return file.getvalue()


# rich.markup.escape lets the second and third of them through.
TAGS = [
    "[red]",
    "[a[/]",
    "[a[/b]",
    "[link=file:x]y[/link]",
    "\\[red]",
    "\\\\\\",
    "[",
    "x[a",
    ":smile:",
    "[@click=f()]x",
]


@pytest.mark.parametrize("name", TAGS)
def test_names_are_no_markup(name: str) -> None:
    assert shown(f"[bold]{escape(name)}[/bold]/]: [dim]{escape(name)}[/dim]") == f"{name}/]: {name}\n"


def test_a_console_shows_unescaped_control_characters_as_escapes() -> None:
    drawn = shown("[red]a\x1b]0;x\x07\u202eb[/red]\nc", force_terminal=True, color_system="standard")
    assert drawn == "\x1b[31ma\\x1b]0;x\\u202eb\x1b[0m\nc\n"  # rich itself drops the bell


def test_a_stream_takes_printable_lines_only() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    stream = PrintableStream(file)
    print("one\x1b]0;x\x07\ntwo\u202e", file=stream, flush=True)
    assert file.buffer.getvalue().decode() == "one\\x1b]0;x\\x07\ntwo\\u202e\n"
    assert (stream.encoding, stream.isatty(), hasattr(stream, "buffer")) == ("utf-8", False, False)


# HTML


def test_a_name_in_html_is_text() -> None:
    name = "</td><script>alert(1)</script>\"' onload=x <!-- & \x1b\u202e"
    pieces: list[str] = []
    parser = HTMLParser()
    parser.handle_data = pieces.append  # type: ignore[assignment, method-assign]
    for event in ("handle_starttag", "handle_comment"):
        setattr(parser, event, lambda *_: pytest.fail("markup"))
    parser.feed(markup.escape(name))
    parser.close()
    assert "".join(pieces) == printable(name)
    assert '"' not in markup.escape(name)


# Markdown


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)


NAMES = [
    "a`b",
    "``",
    "a|b",
    " x ",
    "",
    "*x*",
    "_x_ __y__",
    "[x](http://y)",
    "![x](y)",
    "<script>",
    "&lt;",
    "a\\",
    "\\|",
    "~~x~~",
    "x\n\n# y",
    "<!-- x",
    "```",
    "$x$",
    "www.x.org",
    "https://x.org",
    "a\u202eb",
]


def as_html(name: str) -> str:
    return html.escape(printable(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_code_span_cannot_end_the_span_or_the_cell(name: str) -> None:
    page = rendered(f"{markdown.code(name)} end\n\n| a | b |\n|---|---|\n| {markdown.code(name)} | 1 |\n")
    assert f"<p><code>{as_html(name)}</code> end</p>" in page
    assert f"<td><code>{as_html(name)}</code></td>\n<td>1</td>\n</tr>\n</tbody>" in page


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_sentence_is_text(name: str) -> None:
    assert rendered(f"# a {markdown.text(name)}, b") == f"<h1>a {as_html(name)}, b</h1>\n"


@pytest.mark.parametrize("name", ["bloom-560m", "Llama-3.1_8B", "org/name", "a b", "R&D", "model.layers.*.q_proj"])
def test_harmless_names_are_not_changed(name: str) -> None:
    assert markdown.code(name) == f"`{name}`"
    assert "*" in name or markdown.text(name) == name


def test_a_link_in_the_card_has_the_right_address() -> None:
    assert markdown.link("org/name_1", "https://x.co/org/name_1") == "[org/name_1](https://x.co/org/name_1)"
    page = rendered(markdown.link("a](javascript:x)[b", "https://x.co/a](javascript:x)[b"))
    assert page == '<p><a href="https://x.co/a%5D%28javascript:x%29%5Bb">a](javascript:x)[b</a></p>\n'


# Python


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("LlamaModel", "LlamaModel"),
        ("_X9", "_X9"),
        ("", "AutoModel"),
        ("class", "AutoModel"),
        ("None", "AutoModel"),
        ("X\nimport os", "AutoModel"),
        ("X as y", "AutoModel"),
        ("X;y", "AutoModel"),
        ("*", "AutoModel"),
        ("9X", "AutoModel"),
        ("ＭodelＸ", "AutoModel"),
    ],
)
def test_only_valid_names_become_class_names(name: str, safe: str) -> None:
    assert markdown.python_class(name, otherwise="AutoModel") == safe


# Figures


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


def test_one_is_singular() -> None:
    assert (counted(1, "layer"), counted(1234, "layer")) == ("1 layer", "1,234 layers")


@pytest.mark.parametrize(
    ("needed", "free", "shown"),
    [
        (168_000_001, 167_999_999, ("168,000,001 bytes", "167,999,999 bytes")),
        (168_000_000, 1_000, ("168 MB", "1.00 kB")),
        (5, 5, ("5 B", "5 B")),
    ],
)
def test_two_sizes_are_told_apart(needed: int, free: int, shown: tuple[str, str]) -> None:
    assert told_apart(needed, free) == shown
