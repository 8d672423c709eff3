"""The floors of the house: imports go down only, and what is slow or foreign stays where it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "int8cli"

# From the ground up; a module belongs to the floor of its longest matching prefix.
FLOORS = {
    "int8cli": 0,
    "int8cli.errors": 0,
    "int8cli.llm_int8": 1,
    "int8cli.checkpoint": 2,
    "int8cli.digest": 2,
    "int8cli.lock": 2,
    "int8cli.threads": 2,
    "int8cli.torch_start": 0,
    "int8cli.architectures": 3,
    "int8cli.transformers_versions": 3,
    "int8cli.plan": 3,
    "int8cli.layouts": 3,
    "int8cli.output": 3,
    "int8cli.results": 3,
    "int8cli.records": 3,
    "int8cli.manifest": 3,
    "int8cli.blocks": 3,
    "int8cli.dimensions": 3,
    "int8cli.layer_kinds": 3,
    "int8cli.kv_cache": 3,
    "int8cli.gpus": 3,
    "int8cli.anatomy": 3,
    "int8cli.loaded": 3,
    "int8cli.data": 3,
    "int8cli.outlier_statistics": 3,
    "int8cli.evaluation.results": 3,
    "int8cli.calibration": 4,
    "int8cli.residual_stream": 4,
    "int8cli.weight_suspects": 4,
    "int8cli.memory": 4,
    "int8cli.fit": 4,
    "int8cli.workbench": 4,
    "int8cli.shard": 4,
    "int8cli.shard_task": 4,
    "int8cli.preloaded": 4,
    "int8cli.survey": 4,
    "int8cli.executors": 4,
    "int8cli.columns": 4,
    "int8cli.convert": 4,
    "int8cli.convert_shard": 4,
    "int8cli.conclusion": 4,
    "int8cli.verify": 4,
    "int8cli.runtime": 4,
    "int8cli.evaluation": 4,
    "int8cli.report": 5,
    "int8cli.cli": 6,
    "int8cli.__main__": 6,
}
ONLY_ON_FLOOR = {"typer": {6}, "rich": {5, 6}}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def floor(module: str) -> int:
    while module not in FLOORS:
        module = module.rpartition(".")[0]
        assert module, "every module has a floor"
    return FLOORS[module]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_go_down_only(module: str, path: Path) -> None:
    assert module == "int8cli" or module.split(".")[1] in {name.split(".")[1] for name in FLOORS if "." in name}
    for name in imports(path):
        root = name.split(".")[0]
        if root == "int8cli" and module != "int8cli":  # the package itself offers what lies above, by lazy import
            assert floor(name) <= floor(module), f"{module} imports {name} from a floor above"
        assert floor(module) in ONLY_ON_FLOOR.get(root, {floor(module)}), f"{module} imports {name}"
        assert root != "click", "typer carries its own click"


def test_the_arithmetic_knows_torch_and_nothing_else() -> None:
    allowed = {"torch", "int8cli", "dataclasses", "math", "collections", "typing"}
    for module, path in modules():
        if module.startswith("int8cli.llm_int8"):
            assert {name.split(".")[0] for name in imports(path)} <= allowed, module


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in ("convert", "estimate-memory", "evaluate", "inspect-outliers", "verify")),
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
    code = "import sys, int8cli.survey, int8cli.records, int8cli.output; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
