"""The floors of the house: imports go down only, and slow or foreign packages are imported only where needed."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "int8cli"

# One folder (or module at the root) for each thing that the tool does or knows. A room may import from lower floors.
# Rooms on the same floor do not import each other.
FLOORS = (
    {"errors"},
    {"llm_int8", "loaders", "workers", "data", "progress", "typed_json"},
    {"checkpoint", "results"},
    {"machine", "model", "planning", "records"},
    {"runtime", "outliers", "estimate"},
    {"conversion", "evaluation", "report"},
    {"columns", "upload", "verification"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
COMMANDS = ("convert", "env", "estimate-memory", "evaluate", "inspect-outliers", "status", "verify")
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ONLY_IN_ROOMS = {"typer": {"cli"}, "rich": {"report", "cli"}, "click": set[str]()}  # typer carries its own click
NAMES_A_MODULE = re.compile(r"\bint8cli(?:\.\w+)+(?![\w/])")  # but not a schema such as int8cli.report/2


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(path: Path) -> set[str]:
    """What a module imports: by statement, and by name in a string, as for a child process."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {name for name in NAMES_A_MODULE.findall(node.value) if exists(name)}
    return names


def exists(module: str) -> bool:
    path = PACKAGE.parent / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def room_of(module: str) -> str:
    """The folder of a module; empty for the package itself, whose lazy imports may come from any floor."""
    return f"{module}.".split(".")[1]


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(module) for module, _ in modules()} - {""}
    assert rooms == set(FLOOR)
    assert sum(map(len, FLOORS)) == len(FLOOR)


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_go_down_only(module: str, path: Path) -> None:
    room = room_of(module)
    for name in imports(path):
        root = name.split(".")[0]
        if root == "int8cli" and room and (other := room_of(name)) in FLOOR and other != room:
            assert FLOOR[other] < FLOOR[room], f"{module} imports {name}, which is not below it"
        assert room in ONLY_IN_ROOMS.get(root, {room}), f"{module} imports {name}"


def test_no_two_classes_have_one_name() -> None:
    classes = Counter(
        node.name
        for _, path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in classes.items() if count > 1] == []


# Reasons in reports on disk, and the options of another program.
FLAGS_IN_THE_LIBRARY = {"left alone by --skip", "not named by --only", "--query-gpu=name,memory.total"}
NAMES_A_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+(?!=)\b")
CSS_VARIABLE = re.compile(r"var\(--[\w-]+\)|--[\w-]+: #\w+")


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_the_library_names_no_flag(module: str, path: Path) -> None:
    """Hints that name options belong to the command line: see cli/hints.py."""
    if room_of(module) == "cli":
        return
    tree = ast.parse(path.read_text())
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, holders)}
    found = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and NAMES_A_FLAG.search(CSS_VARIABLE.sub("", node.value))
    ]
    assert [text for text in found if text not in docstrings | FLAGS_IN_THE_LIBRARY] == []


def test_no_command_imports_another() -> None:
    """Neither on the command line nor in the library below it."""
    commands = tuple(command.replace("-", "_") for command in COMMANDS)
    for room in ("cli", "commands"):
        for command in commands:
            names = imports(PACKAGE / room / f"{command}.py")
            others = {f"int8cli.{room}.{other}" for other in commands if other != command}
            assert not [name for name in names if any(name == o or name.startswith(f"{o}.") for o in others)]


def test_the_arithmetic_knows_torch_and_nothing_else() -> None:
    allowed = {"torch", "int8cli"} | {
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "functools",
        "itertools",
        "math",
    }
    allowed |= {"mmap", "threading", "time", "typing", "warnings", "weakref"}
    for module, path in modules():
        if module.startswith("int8cli.llm_int8"):
            assert {name.split(".")[0] for name in imports(path)} <= allowed, module


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *(
            [command, "--help"]
            for command in (
                "convert",
                "dequantize",
                "env",
                "estimate-memory",
                "evaluate",
                "generate",
                "inspect-outliers",
                "report",
                "status",
                "verify",
            )
        ),
    ],
)
def test_help_and_version_import_nothing_large(arguments: list[str]) -> None:
    """Under 0.2 s of CPU time: typer alone takes 0.08, and rich or pydantic as much again."""
    large = ("torch", "numpy", "transformers", "huggingface_hub", "rich", "pydantic")
    code = (
        "import sys; from int8cli.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        f"print([name for name in {large} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout
    assert result.stderr.strip() == "[]"


def test_a_survey_of_safetensors_needs_no_torch() -> None:
    modules = "int8cli.planning.survey, int8cli.records.store, int8cli.planning.output_files"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
