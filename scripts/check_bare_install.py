"""Install the package as a user does, without test dependencies, and run every command on a tiny model.

    python scripts/check_bare_install.py .venv-bare locked

Makes three installations, one after the other in one virtual environment: the package alone, with `plots`, and with
`calibrate`. Each command must either work or say which extra it needs. None may print a traceback, or torch's warning
about missing numpy. The model is made here from bytes, without imports that the package might lack.
"""

import argparse
import json
import math
import random
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from pins import ROOT, constraints, read_project, torch_line

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 64, 128, 2, 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "dtype": "float16",
}
NEVER = re.compile(r"Traceback|numpy", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Check:
    """A command line of int8cli. It must exit with 0 if the extra that it `needs` is installed, otherwise name it."""

    arguments: tuple[str, ...]
    needs: str = ""

    def fault(self, python: Path, extra: str, directory: Path) -> str | None:
        command = [str(python), "-m", "int8cli", *self.arguments]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300)
        printed = done.stdout + done.stderr
        works = self.needs in ("", extra)
        if NEVER.search(printed) or done.returncode != (0 if works else 1):
            return f"{self}: exit {done.returncode}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
        if works or f"int8cli[{self.needs}]" in printed:
            return None
        return f"{self}: does not name its extra\n{done.stderr}"

    def __str__(self) -> str:
        return f"int8cli {' '.join(self.arguments)}"


CHECKS = (
    Check(("convert", "model")),
    Check(("convert", "model", "--output", "plain", "--outliers", "none", "--layout", "compressed-tensors")),
    Check(("convert", "model", "--output", "guessed", "--outliers", "weights")),
    Check(("convert", "model", "--output", "run", "--outliers", "activations"), needs="calibrate"),
    Check(("verify", "model-int8")),
    Check(("verify", "model-int8", "--source", "model")),
    Check(("estimate-memory", "model")),
    Check(("inspect-outliers", "model")),
    Check(("inspect-outliers", "model", "--from", "activations"), needs="calibrate"),
    Check(("inspect-outliers", "model", "--output", "statistics.safetensors"), needs="calibrate"),
    Check(("inspect-outliers", "model", "--from", "weights")),
    Check(("inspect-outliers", "model", "--from", "weights", "--output", "page.html"), needs="plots"),
    Check(("inspect-outliers", "model", "--from", "weights", "--output", "page.svg"), needs="plots"),
    Check(("evaluate", "model"), needs="calibrate"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environment", type=Path, help="a new virtual environment, with or without torch")
    parser.add_argument("end", choices=["locked", "oldest", "newest"])
    parser.add_argument("--torch", help="a version of torch, or oldest or newest, instead of the locked one")
    arguments = parser.parse_args()
    pip = Pip(arguments.environment.absolute() / "bin" / "python")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build_wheel(Path(scratch))
        for extra in ("", "plots", "calibrate"):
            before = pip.installed()
            pip.install(f"{wheel}[{extra}]" if extra else str(wheel), limits(arguments.end, extra, arguments.torch))
            check(pip.python, extra)
            if extra == "plots":
                pip.uninstall(pip.installed() - before)


@dataclass(frozen=True, slots=True)
class Pip:
    """The pip of one virtual environment."""

    python: Path

    def run(self, *arguments: str) -> str:
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def installed(self) -> set[str]:
        return {package["name"] for package in json.loads(self.run("list", "--format", "json"))}

    def install(self, requirement: str, constraints: list[str]) -> None:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
            file.write("\n".join(constraints))
            file.flush()
            self.run("install", "-qq", "--constraint", file.name, requirement)

    def uninstall(self, names: set[str]) -> None:
        self.run("uninstall", "-qq", "--yes", *sorted(names))


def build_wheel(directory: Path) -> Path:
    """Build the wheel that users install, with the build backend of this environment."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


def limits(end: str, extra: str, torch: str | None) -> list[str]:
    """Constraints for the package with one extra.

    For the oldest end without `calibrate`, these are the lower bounds in pyproject.toml. They may be lower than the
    versions in the oldest lock file, which also has to satisfy transformers.
    """
    if end != "oldest" or extra == "calibrate":
        return constraints(end, torch)
    table = read_project()["project"]
    lines = table["dependencies"] + (table["optional-dependencies"][extra] if extra else [])
    return [*torch_line(torch), *(lowest(Requirement(line)) for line in lines if "torch" not in line)]


def lowest(requirement: Requirement) -> str:
    (bound,) = (one.version for one in requirement.specifier if one.operator == ">=")
    return f"{requirement.name}=={bound}"


def check(python: Path, extra: str) -> None:
    """Run every check. Exits with a message if any fails."""
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory, "model"))
        faults = [fault for one in CHECKS if (fault := one.fault(python, extra, Path(directory)))]
    print(
        f"int8cli{f'[{extra}]' if extra else ''} alone: {len(CHECKS)} command lines, {len(faults)} failed", flush=True
    )
    if faults:
        sys.exit("\n".join(faults))


def unchecked(python: Path) -> set[str]:
    """The commands of int8cli that no check runs."""
    code = "from int8cli.cli import app; print(*(command.name for command in app.registered_commands))"
    names = subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return set(names) - {one.arguments[0] for one in CHECKS}


def write_model(directory: Path) -> None:
    """A Llama of 0.1 million parameters in float16, with a tokenizer that has a token for each byte."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer()))
    numbers = random.Random(0)
    header, data = {}, bytearray()
    for name, shape in shapes():
        count = math.prod(shape)
        values = [1.0] * count if len(shape) == 1 else [numbers.gauss(0, 0.05) for _ in range(count)]
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [len(data), len(data) + 2 * count]}
        data += struct.pack(f"<{count}e", *values)
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            yield f"{prefix}.self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def tokenizer() -> dict[str, Any]:
    """Byte-level BPE without merges. As in GPT-2, bytes that are not printable become characters from 256 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    characters = {byte: chr(byte) for byte in printing} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {characters[byte]: byte for byte in range(256)}, "merges": []},
    }


if __name__ == "__main__":
    main()
