"""The pages are correct: command lines parse, options exist, links have targets, Python examples run."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from support.calibration_models import make_model

from int8cli.cli import app

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from recording import Line, record, to_svg  # noqa: E402
from refresh_docs import blocks_of, picked  # noqa: E402
from slim_svg import slimmed  # noqa: E402

PAGES = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}(\S.*)$", re.MULTILINE)
LINK = re.compile(r"\[[^][]*\]\((?P<target>[^()\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
REDIRECTIONS = ("|", ">", "2>", "&&", ";")
# Options of other programs that the pages mention.
OF_OTHERS = {"--torch-backend", "--strict", "--local-dir", "--install-completion"}  # the last is not of one command
OF_OTHERS |= {"--array", "--cpus-per-task", "--dependency", "--job-name", "--mem", "--parsable", "--requeue", "--time"}
OF_OTHERS |= {"--wrap", "--detach", "--flavor"}  # of hf jobs; the others are of sbatch
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

pages = pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])


def without_code(text: str) -> str:
    return INLINE_CODE.sub("", FENCE.sub("", text))


def command_lines(text: str) -> Iterator[str]:
    """The command lines that a reader could copy: lines of code blocks that begin with `int8cli`."""
    blocks = [match["body"] for match in FENCE.finditer(text)]
    for line in [*"".join(blocks).splitlines(), *INDENTED.findall(FENCE.sub("", text))]:
        command = line.strip().removeprefix("$ ")
        if command.startswith("int8cli "):
            yield command


def arguments_of(line: str) -> list[str]:
    """The arguments of a command line, up to a pipe or a redirection."""
    words = shlex.split(line, comments=True)[1:]
    end = next((place for place, word in enumerate(words) if word in REDIRECTIONS), len(words))
    return words[:end]


def known_options() -> set[str]:
    """Every option of the program, and of the scripts."""
    options = {name for command in COMMANDS.values() for each in command.params for name in each.opts}
    options |= {name for command in COMMANDS.values() for each in command.params for name in each.secondary_opts}
    scripts = [path.read_text() for path in (ROOT / "scripts").glob("*.py")]
    return options | {name for text in scripts for name in re.findall(r'"(--[\w-]+)"', text)} | {"--help", "--version"}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = set()
    for heading in HEADING.findall(FENCE.sub("", page.read_text())):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"`|\*", "", heading).strip().lower())
        found.add(plain.replace(" ", "-"))
    return found


@pages
def test_command_lines_parse(page: Path) -> None:
    for line in command_lines(page.read_text()):
        name, *arguments = arguments_of(line)
        if name in ("--version", "--help"):
            continue
        assert name in COMMANDS, line
        COMMANDS[name].make_context(name, arguments)  # raises for an option or a value that there is not


@pages
def test_options_exist(page: Path) -> None:
    named = set(OPTION.findall(page.read_text()))
    assert named - known_options() - OF_OTHERS == set()


def test_a_missing_option_is_detected() -> None:
    assert "--no-such-option" not in known_options()
    [line] = command_lines("```console\n$ int8cli convert org/name --no-such-option\n```")
    with pytest.raises(Exception, match="no-such-option"):
        COMMANDS["convert"].make_context("convert", arguments_of(line)[1:])


@pages
def test_links_have_targets(page: Path) -> None:
    for match in LINK.finditer(without_code(page.read_text())):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"\w+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.is_file(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}#{anchor}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [path.name for path in PAGES if path.parent.name == "docs" and f"({path.name})" not in index]
    assert missing == ["README.md"]


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pages
def test_outputs_are_filled_in(page: Path) -> None:
    text = page.read_text()
    assert text.count("<!-- output: ") == len(blocks_of(text)) == text.count("<!-- end of output -->")
    for shown in blocks_of(text):
        assert f"```console\n$ {shown.command}\n" in text


def test_lines_are_selected_and_omissions_marked() -> None:
    output = [f"line {number}" for number in range(1, 7)]
    assert picked(output, "1-last") == output
    assert picked(output, "1 3-4") == ["line 1", "…", "line 3", "line 4", "…"]
    assert picked(output, "5-last") == ["…", "line 5", "line 6"]
    with pytest.raises(ValueError, match="lines 5-9"):
        picked(output, "5-9")


def test_a_recording_has_every_line_at_its_time_and_fetches_nothing() -> None:
    program = "import time; print('first', flush=True); time.sleep(0.2); print('\\x1b[1msecond\\x1b[0m')"
    first, second = record([sys.executable, "-c", program], ROOT, 60)
    assert (first.text, second.text) == ("first", "\x1b[1msecond\x1b[0m")
    assert first.seconds < second.seconds
    svg = to_svg("program", [first, second])
    assert re.findall(r">(\$&#160;program|first|second)<", svg) == ["$&#160;program", "first", "second"]
    assert svg.count("animation: appear") == 2
    assert "url(http" not in svg


@pytest.mark.parametrize("progress", ["block {}/9 h in 1.0 s", "calibrate [{}/9] h in 1.0 s"])
def test_a_recording_shortens_progress_visibly(progress: str) -> None:
    blocks = [Line(progress.format(number), float(number)) for number in range(1, 10)]
    svg = to_svg("program", [*blocks, Line("done", 10.0)])
    assert [f"{number}/9" in svg for number in range(1, 10)] == [True, *[False] * 7, True]
    assert ">…<" in svg


def test_a_slim_picture_rounds_only_coordinates_and_defines_repeated_marks_once() -> None:
    marks = "".join(f'<path transform="translate({x}.128,1)" d="M4.1833,0Z" fill="red"/>' for x in range(6))
    svg = slimmed(
        f'<svg width="9"><g aria-label="point">{marks}<text opacity="0.123">0.003 and 1.2345</text></g></svg>'
    )
    assert svg.startswith('<svg width="9"><defs><path id="m0" d="M4.2,0Z" fill="red"/></defs><g><use href="#m0" ')
    assert svg.count("<use ") == 6
    assert 'transform="translate(5.1,1)"' in svg
    assert '<text opacity="0.123">0.003 and 1.2345</text>' in svg


def test_every_schema_is_on_the_page_of_formats() -> None:
    page = (ROOT / "docs" / "output-format.md").read_text()
    sources = [path.read_text() for path in (ROOT / "int8cli").rglob("*.py")]
    schemas = {schema for text in sources for schema in re.findall(r'_SCHEMA = "([^"]+)"', text)}
    assert schemas == set(re.findall(r"`(int8cli\.[\w.-]+/\d+)`", page))


def test_the_picture_and_the_table_of_the_benchmark_have_the_same_figures() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    front = (ROOT / "README.md").read_text()
    for run in json.loads((ROOT / "docs" / "benchmarks.json").read_text())["peers"]["runs"]:
        [row] = [line for line in page.splitlines() if run["name"] in line and f"| {run['seconds']} |" in line]
        for figure in ("start_apart_s", "cpu_seconds"):
            assert f"| {run[figure]} |" in row
        assert f"| {run['peak_memory_mb']} MB |" in row
        assert f"| {run['seconds']} | {run['peak_memory_mb']} MB |" in front


def python_pages() -> list[Path]:
    return [page for page in PAGES if "```python\n" in page.read_text()]


@pytest.mark.parametrize("page", python_pages(), ids=lambda page: page.name)
def test_python_examples_run(page: Path, tmp_path: Path) -> None:
    """They run in order, as one program, with a tiny model in place of the demo model."""
    make_model("llama", tmp_path / "demo" / "SmolLM2-135M-Instruct")
    program = "\n".join(match["body"] for match in FENCE.finditer(page.read_text()) if match["language"] == "python")
    (tmp_path / "example.py").write_text(program)
    command = [sys.executable, "-W", "ignore", "example.py"]
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_the_page_on_architecture_names_every_folder_and_only_files_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "int8cli"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert {folder for folder in folders if f"| `{folder}` |" not in page} == set()
    files = set(re.findall(r"(?<![\w/])((?:[a-z0-9_]+/)+[a-z0-9_]+\.py)", page)) - {"tests/test_house.py"}
    assert len(files) > 15
    assert {file for file in files if not (package / file).is_file()} == set()
