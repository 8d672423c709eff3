"""Names that would be commands to a terminal, a page or a reader, through every command and into every output.

Tensors, shards, directories, other files and values of config.json all have such names. Whatever is printed or written
is read as its reader would: nothing of a name is left raw, and nothing of it is structure.
"""

import ast
import json
import re
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from support.calibration_models import WORDS, make_model
from support.hub_stand_in import Fault, HubStandIn
from support.program import Nursery, Outcome, llama_config, llama_tensors, write_json

# A title for the terminal's window, colors, rich's tags with one that its own escape() lets through, and what ends or
# begins something in Markdown, HTML, a script and a line; text that runs backwards, and of no width.
EVIL = "\x1b]0;PWNED\x07\x1b[31m\x9b31m[bold][/][a[/b]`|<!--<script>*x*\r\n\n# y\u202e\u200b](u)</script>\\"
EVIL_FILE = re.sub(r"[/\\]", "", EVIL) + "\x1b]0;x\x07"
OWN_ELEMENTS = {"html", "head", "meta", "title", "link", "style", "body", "h1", "h2", "p", "div", "script", "button"}
OWN_ELEMENTS |= {"table", "thead", "tbody", "tr", "th", "td", "main", "caption", "wbr"}
OWN_ATTRIBUTES = {"charset", "class", "content", "data-value", "href", "id", "lang", "name", "rel", "type"}
OWN_ATTRIBUTES |= {"aria-label", "role", "scope", "tabindex"}
GENERATE = 'int8cli generate . "The moon rose over the harbour, and"\n'
LINKS = ("https://arxiv.org/abs/2208.07339", "https://github.com/int8cli/int8cli", "https://huggingface.co/org/m")
PACKAGE = Path(__file__).parents[1] / "int8cli"


def hostile(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Some tensors with names of which each kind is treated in its own way."""
    width = tensors["model.norm.weight"].shape[0]
    names = {
        f"model.layers.0.{EVIL}.q_proj.weight": (width, width),
        f"{EVIL}.weight": (8, width),
        f"x{EVIL}.bias": (4,),
    }
    return {
        name: torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).bfloat16()
        for name, shape in names.items()
    }


def write_shards(directory: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    for file, tensors in shards.items():
        save_file(tensors, directory / file, metadata={"format": "pt", EVIL: EVIL})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which every name that can be is hostile. Nothing can run it."""
    directory = tmp_path_factory.mktemp("hostile") / f"dir{EVIL_FILE}"
    directory.mkdir()
    usual = llama_tensors(2, 64, 96, 128, 0, torch.bfloat16)
    write_shards(directory, {f"1{EVIL_FILE}.safetensors": usual, f"2{EVIL_FILE}.safetensors": hostile(usual)})
    config = llama_config(2, 64, 96, 128) | {"architectures": [f"X{EVIL}\nimport os  #ForCausalLM\nos.system('')"]}
    write_json(directory / "config.json", config | {EVIL: EVIL})
    write_json(directory / "tokenizer_config.json", {EVIL: EVIL})
    (directory / f"note{EVIL_FILE}.pkl").write_text(EVIL)
    return directory


@pytest.fixture(scope="module")
def runnable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA that runs, in a hostile directory and shard and with a hostile text; its layers have their own names."""
    directory = make_model("llama", tmp_path_factory.mktemp("runs") / f"dir{EVIL_FILE}")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    write_shards(directory, {f"1{EVIL_FILE}.safetensors": tensors})
    (directory.parent / f"text{EVIL_FILE}.txt").write_text(" ".join(WORDS * 3))
    return directory


def text_of(model: Path) -> list[str | Path]:
    return ["--text", model.parent / f"text{EVIL_FILE}.txt", "--tokens", "64"]


# Checks for each kind of output


def raw_characters(text: str) -> list[str]:
    return sorted({unicodedata.name(c, repr(c)) for c in text.replace("\n", "") if not c.isprintable()})


def check_lines(outcome: Outcome, code: int = 0, *, named: bool = True) -> None:
    """Nothing raw on stdout and stderr, and the name is there in full, however it was broken."""
    both = outcome.out + outcome.err
    assert outcome.code == code, both
    assert "Traceback" not in both
    assert raw_characters(both) == []
    squeezed = re.sub(r"\s", "", both)
    assert not named or "[bold][/][a[/b]`|" in squeezed or "[bold][][a[b]`|" in squeezed, both


def check_json(outcome: Outcome) -> None:
    """One document, of ASCII alone, from which the names come back as they are."""
    assert outcome.code == 0, outcome.err
    assert outcome.out.isascii()
    assert raw_characters(outcome.out + outcome.err) == []
    assert any(EVIL_FILE in text or EVIL in text for text in strings_in(json.loads(outcome.out)))


def strings_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for each in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from strings_in(each)


def check_drawn(drawn: str) -> None:
    """Nothing but rich's own colors and moves of the cursor; names would bring OSC and C1 characters too."""
    rest = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", drawn)
    assert raw_characters(rest) == []
    assert "PWNED" in re.sub(r"\s", "", rest)
    assert "\x1b[31m\x9b" not in drawn


def check_card(path: Path) -> None:
    """The front matter apart, the card has its own structure only, and its Python is Python."""
    text = path.read_text()
    assert raw_characters(text) == []
    tokens = MarkdownIt("commonmark").enable("table").parse(text.partition("\n---\n")[2])
    heads = [token.tag for token in tokens if token.type == "heading_open"]
    assert heads[:1] == ["h1"]
    assert set(heads[1:]) == {"h2"}
    assert not [token for token in tokens if token.type in ("html_block", "blockquote_open", "hr")]
    assert {token.content for token in tokens if token.type == "code_block"} <= {GENERATE}
    for token in (child for block in tokens for child in block.children or ()):
        assert token.type != "html_inline" or token.content in ("<code>", "</code>")
        assert token.type not in ("image", "em_open", "strong_open")
        assert token.type != "link_open" or token.attrs["href"] in LINKS
    for code in (token.content for token in tokens if token.type == "fence"):
        imported, assigned = ast.parse(code).body
        assert isinstance(imported, ast.ImportFrom)
        assert isinstance(assigned, ast.Assign)
        assert imported.module in ("transformers", "int8cli")
    check_tables(text)


def check_tables(text: str) -> None:
    """Every row has as many cells as its head."""
    page = MarkdownIt("commonmark").enable("table").render(text)
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        counts = {len(re.findall(r"<t[dh]\b", row)) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)}
        assert len(counts) == 1
    assert page.count("<tr>") == len([line for line in text.splitlines() if re.match(r"\| |\|$", line)])


class _Page(HTMLParser):
    """The elements of a page, its text, and its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: set[str] = set()
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.comments: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        (self.scripts if self.lasttag == "script" and self.elements[-1] == "script" else self.text).append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def check_page(path: Path) -> None:
    """Elements and attributes of ours only, two scripts, and no raw character outside of Vega's own."""
    text = path.read_text()
    page = _Page(text)
    assert set(page.elements) <= OWN_ELEMENTS
    assert page.elements.count("script") == 2
    assert page.attributes <= OWN_ATTRIBUTES
    assert page.comments == []
    library, specs = "".join(page.scripts).split("const charts = ", 1)
    assert raw_characters("".join(page.text)) == []
    assert raw_characters(specs) == []
    assert len(library) > 100_000
    assert "<" not in specs.partition("};\n")[0].partition("const ink")[0]
    assert "PWNED" in "".join(page.text)


def check_picture(path: Path) -> None:
    """XML, with elements of text and drawing only."""
    text = path.read_text()
    assert raw_characters(text) == []
    elements = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    assert elements <= {
        "svg",
        "g",
        "path",
        "text",
        "tspan",
        "rect",
        "line",
        "defs",
        "clipPath",
        "style",
        "linearGradient",
        "stop",
    }


# The commands


def test_a_conversion_and_what_it_writes(source: Path, model_nursery: Nursery, tmp_path: Path) -> None:
    out = tmp_path / f"out{EVIL_FILE}"
    check_lines(model_nursery.run("convert", source, "-o", out, "--outliers", "weights", cwd=tmp_path))
    check_card(out / "README.md")
    assert (out / "int8/report.json").read_bytes().isascii()
    check_lines(model_nursery.run("verify", out, "--source", source, cwd=tmp_path))
    check_json(model_nursery.run("verify", out, "--json", cwd=tmp_path))
    shard = next(out.glob("1*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    (out / f"more{EVIL_FILE}.safetensors").write_bytes(b"")
    check_lines(model_nursery.run("verify", out, "--source", source, cwd=tmp_path), 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "--outliers", "none"],
        ["convert", "--outliers", "none", "--no-figures"],
        ["convert", "--outliers", "none", "--layout", "compressed-tensors", "--skip", f"*{EVIL}*"],
        ["convert", "--dry-run", "--outliers", "weights"],
        ["convert", "--dry-run", "--only", f"{EVIL}[bold]"],
        ["estimate-memory"],
        ["estimate-memory", "--gpu", "24GiB", "--gpu", "1GiB"],
        ["inspect-outliers", "--from", "weights"],
    ],
    ids=lambda arguments: " ".join(arguments)[:40].encode("ascii", "ignore").decode().replace("\x1b", ""),
)
def test_commands_print_hostile_names_safely(
    arguments: list[str], source: Path, nursery: Nursery, tmp_path: Path
) -> None:
    output: list[str] = ["-o", f"out{EVIL_FILE}"] if arguments[0] == "convert" else []
    work: list[str | Path] = ["--work-dir", tmp_path / "work"] if arguments[0] == "inspect-outliers" else []
    check_lines(nursery.run(arguments[0], source, *arguments[1:], *output, *work, cwd=tmp_path))
    again = ["--overwrite"] if output and "--dry-run" not in arguments else []
    check_json(nursery.run(arguments[0], source, *arguments[1:], *output, *work, *again, "--json", cwd=tmp_path))
    if again:
        check_card(tmp_path / f"out{EVIL_FILE}/README.md")


def test_suspects_in_a_page_and_a_picture(source: Path, nursery: Nursery, tmp_path: Path) -> None:
    files = [arg for suffix in ("html", "svg", "png") for arg in ("-o", f"s{EVIL_FILE}.{suffix}")]
    outcome = nursery.run("inspect-outliers", source, "--from", "weights", *files, "--work-dir", "w", cwd=tmp_path)
    check_lines(outcome)
    check_page(tmp_path / f"s{EVIL_FILE}.html")
    check_picture(tmp_path / f"s{EVIL_FILE}.svg")


def test_activations_in_tables_a_page_and_pictures(runnable: Path, model_nursery: Nursery, tmp_path: Path) -> None:
    command = [
        "inspect-outliers",
        runnable,
        *text_of(runnable),
        "--sequence-length",
        "16",
        "--work-dir",
        f"w{EVIL_FILE}",
    ]
    files = [arg for suffix in ("html", "svg", "safetensors") for arg in ("-o", f"s{EVIL_FILE}.{suffix}")]
    check_lines(model_nursery.run(*command, "--from", "activations", *files, cwd=tmp_path))
    check_json(model_nursery.run(*command, "--json", cwd=tmp_path))
    check_page(tmp_path / f"s{EVIL_FILE}.html")
    check_picture(tmp_path / f"s{EVIL_FILE}.svg")
    by: list[str | Path] = ["--outliers", tmp_path / f"s{EVIL_FILE}.safetensors"]
    check_lines(model_nursery.run("convert", runnable, "-o", "by", *by, cwd=tmp_path))
    check_card(tmp_path / "by/README.md")
    check_lines(
        model_nursery.run("convert", runnable, "-o", "a", "--outliers", "activations", *text_of(runnable), cwd=tmp_path)
    )
    check_card(tmp_path / "a/README.md")


def test_an_evaluation_in_tables_a_page_and_a_picture(runnable: Path, model_nursery: Nursery, tmp_path: Path) -> None:
    command = ["evaluate", runnable, *text_of(runnable), "--sequence-length", "16", "--work-dir", f"w{EVIL_FILE}"]
    files = [arg for suffix in ("html", "svg") for arg in ("-o", f"e{EVIL_FILE}.{suffix}")]
    check_lines(model_nursery.run(*command, *files, cwd=tmp_path))
    check_json(model_nursery.run(*command, "--json", cwd=tmp_path))
    check_page(tmp_path / f"e{EVIL_FILE}.html")
    check_picture(tmp_path / f"e{EVIL_FILE}.svg")


def test_a_conversion_in_a_page_and_a_picture(source: Path, nursery: Nursery, tmp_path: Path) -> None:
    page = f"c{EVIL_FILE}.html"
    converted: list[str | Path] = [
        "convert",
        source,
        "-o",
        "out",
        "--outliers",
        "none",
        "--skip",
        "*norm*",
        "--report",
        page,
    ]
    check_lines(nursery.run(*converted, cwd=tmp_path))
    files = [arg for suffix in ("html", "svg") for arg in ("-o", f"r{EVIL_FILE}.{suffix}")]
    check_lines(nursery.run("report", "out", *files, cwd=tmp_path))
    check_json(nursery.run("report", "out", "--json", cwd=tmp_path))
    check_page(tmp_path / page)
    check_page(tmp_path / f"r{EVIL_FILE}.html")
    check_picture(tmp_path / f"r{EVIL_FILE}.svg")


# Errors


@pytest.mark.parametrize("command", ["convert", "estimate-memory", "inspect-outliers", "evaluate", "verify"])
def test_errors_and_usage(command: str, source: Path, nursery: Nursery, tmp_path: Path) -> None:
    check_lines(nursery.run(command, f"./no{EVIL_FILE}", cwd=tmp_path), 1)
    check_lines(nursery.run(command, source, f"--no{EVIL}", cwd=tmp_path), 2)
    check_lines(nursery.run(command, source, source, cwd=tmp_path), 2)


def test_a_model_that_cannot_run(source: Path, nursery: Nursery, tmp_path: Path) -> None:
    commands: tuple[list[str | Path], ...] = (
        ["convert", source, "--outliers", "activations"],
        ["evaluate", source, "--work-dir", "w"],
    )
    for arguments in commands:
        check_lines(nursery.run(*arguments, cwd=tmp_path), 1, named=False)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": EVIL, "architectures": [EVIL]},
        {"hidden_act": EVIL},
        {"rope_scaling": {"rope_type": EVIL, EVIL: EVIL}},
        {"quantization_config": {"quant_method": EVIL, EVIL: EVIL}},
        {"torch_dtype": EVIL},
        {"num_hidden_layers": EVIL},
        {"architectures": EVIL},
        {"auto_map": {"AutoConfig": EVIL}},
    ],
    ids=lambda config: next(iter(config)),
)
def test_values_of_the_config(config: dict[str, object], runnable: Path, nursery: Nursery, tmp_path: Path) -> None:
    """Whether the model can still be run or not, and whoever speaks of it: transformers warns by itself."""
    source = tmp_path / "m"
    source.mkdir()
    for path in runnable.iterdir():
        (source / path.name).symlink_to(path)
    (source / "config.json").unlink()
    write_json(source / "config.json", json.loads((runnable / "config.json").read_text()) | config)
    commands: tuple[list[str | Path], ...] = (
        ["convert", source, "-o", "o", "--outliers", "auto"],
        ["estimate-memory", source],
    )
    for arguments in commands:
        outcome = nursery.run(*arguments, cwd=tmp_path)
        check_lines(outcome, outcome.code, named=False)
    if (tmp_path / "o/README.md").exists():
        check_card(tmp_path / "o/README.md")
        outcome = nursery.run("verify", "o", cwd=tmp_path)
        check_lines(outcome, outcome.code, named=False)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_messages_of_the_tokenizer(file: str, runnable: Path, nursery: Nursery, tmp_path: Path) -> None:
    source = tmp_path / "m"
    source.mkdir()
    for path in runnable.iterdir():
        (source / path.name).symlink_to(path)
    (source / file).unlink()
    write_json(source / file, {"tokenizer_class": EVIL, "model": {"type": EVIL}, EVIL: EVIL, "added_tokens": EVIL})
    outcome = nursery.run("evaluate", source, *text_of(runnable), "--work-dir", "w", cwd=tmp_path)
    check_lines(outcome, outcome.code, named=False)


# A terminal


def test_the_progress_bar_and_the_report_on_a_terminal(source: Path, nursery: Nursery, tmp_path: Path) -> None:
    with HubStandIn(cdn=None) as hub:
        hub.add_repo("org/m", source)
        hub.fail("*.safetensors", Fault(bytes_per_s=200_000, times=99))
        here = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
        code, drawn = nursery.on_terminal("convert", "org/m", "-o", "o", "--outliers", "none", cwd=tmp_path, env=here)
    assert code == 0, drawn
    check_drawn(drawn)
    assert re.search(r"\bdownload: [12]\\x1b\]0;PWNED", drawn), "no bar was drawn with the name:\n" + drawn
    check_card(tmp_path / "o/README.md")


def test_reports_on_a_terminal(source: Path, nursery: Nursery, tmp_path: Path) -> None:
    for arguments in (
        ["convert", str(source), "-o", f"o{EVIL_FILE}", "--outliers", "weights"],
        ["convert", str(source), "--dry-run"],
        ["estimate-memory", str(source)],
    ):
        code, drawn = nursery.on_terminal(*arguments, cwd=tmp_path)
        assert code == 0, drawn
        check_drawn(drawn)


def test_all_commands_on_a_terminal(source: Path, runnable: Path, model_nursery: Nursery, tmp_path: Path) -> None:
    """Progress of every command, its result, and an error."""
    out = f"o{EVIL_FILE}"
    model_nursery.run("convert", source, "-o", out, "--outliers", "none", cwd=tmp_path)
    text = [str(argument) for argument in text_of(runnable)]
    commands = (
        (0, ["verify", out, "--source", str(source)]),
        (0, ["inspect-outliers", str(source), "--from", "weights", "--work-dir", f"w{EVIL_FILE}"]),
        (0, ["inspect-outliers", str(runnable), *text, "--sequence-length", "16", "--work-dir", f"w{EVIL_FILE}"]),
        (0, ["evaluate", str(runnable), *text, "--sequence-length", "16", "--work-dir", f"w{EVIL_FILE}"]),
        (0, ["convert", str(runnable), "-o", f"a{EVIL_FILE}", "--outliers", "activations", *text]),
        (1, ["verify", f"no{EVIL_FILE}"]),
        (1, ["convert", str(source), "-o", out, "--outliers", f"no/{EVIL_FILE}.safetensors"]),
    )
    for expected, arguments in commands:
        code, drawn = model_nursery.on_terminal(*arguments, cwd=tmp_path)
        assert code == expected, drawn
        check_drawn(drawn)


@pytest.mark.parametrize(
    "arguments", [["--revision", EVIL], [f"org/m{EVIL_FILE}"], [f"org/{EVIL_FILE}/x"]], ids=range(3)
)
def test_a_revision_and_an_id_that_no_hub_has(arguments: list[str], nursery: Nursery, tmp_path: Path) -> None:
    model = ["org/m"] if arguments[0] == "--revision" else []
    with HubStandIn(cdn=None) as hub:
        for command in ("convert", "estimate-memory", "inspect-outliers"):
            env = {"HF_ENDPOINT": hub.endpoint}
            outcome = nursery.run(command, *model, *arguments, cwd=tmp_path, env=env)
            check_lines(outcome, 1, named=False)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_the_hub_answers(status: int, source: Path, nursery: Nursery, tmp_path: Path) -> None:
    with HubStandIn(cdn=None) as hub:
        hub.add_repo("org/m", source)
        evil = {"X-Error-Message": "\x1b]0;PWNED\x07[/]", "X-Error-Code": "\x1b]0;x\x07", "Retry-After": "0"}
        hub.fail("api", Fault(status=status, headers=evil, times=99))
        outcome = nursery.run("estimate-memory", "org/m", cwd=tmp_path, env={"HF_ENDPOINT": hub.endpoint})
    check_lines(outcome, 1, named=False)


# Rules for the code


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


MODULES = [*sorted((PACKAGE / "report").rglob("*.py")), *sorted((PACKAGE / "cli").rglob("*.py"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_each_reader_is_reached_in_one_way(path: Path) -> None:
    """Consoles are made in terminal.py, HTML is escaped in markup.py, and print takes JSON or what is printable."""
    text = path.read_text()
    assert "rich.markup" not in text
    assert "sys.stdout.write" not in text
    assert path.name == "markup.py" or not re.search(r"^(import html|from html\b)", text, re.MULTILINE)
    for name, call in calls(path):
        assert name not in ("Console", "rich.print", "click.echo") or path.name == "terminal.py"
        if name == "print":
            assert all(is_safe(argument) for argument in call.args), ast.unparse(call)


def is_safe(argument: ast.expr) -> bool:
    """A constant, JSON in ASCII, or a text in which every value is made printable, or either of two."""
    if isinstance(argument, ast.BoolOp):
        return all(is_safe(each) for each in argument.values)
    if isinstance(argument, ast.JoinedStr):
        return all(is_safe(value.value) for value in argument.values if isinstance(value, ast.FormattedValue))
    if isinstance(argument, ast.Call):
        return ast.unparse(argument.func) in ("printable", "printable_lines", "json.dumps")
    return isinstance(argument, ast.Constant)


def test_json_is_ascii() -> None:
    """But in the header of a safetensors file, which is compared byte for byte with that package's."""
    found = {path.name for path in PACKAGE.rglob("*.py") for _, call in calls(path) if is_not_ascii(call)}
    assert found == {"header.py"}


def is_not_ascii(call: ast.Call) -> bool:
    return any(keyword.arg == "ensure_ascii" for keyword in call.keywords)
