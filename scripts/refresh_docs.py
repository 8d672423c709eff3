"""Run the commands whose output README.md and docs/ show, and replace it by what they print now.

A block of output is between two comments. The first one says what to run:

    <!-- output: int8cli verify demo/SmolLM2-135M-Instruct-int8
         lines: 1-6 16-18
         stderr: yes
         without: demo/SmolLM2-135M-Instruct-int8 -->
    …
    <!-- end of output -->

`lines` selects lines of the output, from 1 to `last`. Omitted lines become `…`. `stderr: yes` also shows progress.
`without` names a directory in demo/ that is deleted before the command runs, so that a conversion starts from the
beginning. `run` is the command to run, if the one that is shown would need the Hub. Commands run in the root of the
repository, in the order of the pages. A command that is shown several times runs once. They need the model that
`make demo` makes.

    python scripts/refresh_docs.py            all pages
    python scripts/refresh_docs.py README.md  only this page
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"(?P<head><!-- output: (?P<fields>.*?) -->\n)(?P<body>.*?)(?P<end><!-- end of output -->)", re.DOTALL
)
OMITTED = "…"
LIMIT_S = 1800


@dataclass(frozen=True, slots=True)
class Shown:
    """A block of output: the command, the lines that are shown, and how to run it."""

    command: str
    lines: str
    stderr: bool
    without: str
    run: str

    @classmethod
    def of(cls, fields: str) -> "Shown":
        """Parse the fields of a comment. Raises ValueError for an unknown field."""
        command, *others = (line.strip() for line in fields.splitlines())
        values = {"lines": "1-last", "stderr": "no", "without": "", "run": command}
        for line in others:
            name, _, value = line.partition(": ")
            if name not in values:
                raise ValueError(f"output of {command!r}: there is no field {name!r}")
            values[name] = value.strip()
        return cls(command, values["lines"], values["stderr"] == "yes", values["without"], values["run"])


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(text: str) -> list[Shown]:
    return [Shown.of(match["fields"]) for match in BLOCK.finditer(text)]


def picked(output: list[str], lines: str) -> list[str]:
    """The selected lines, with `…` for omitted lines. Raises ValueError if a number is beyond the end of the output."""
    found: list[str] = []
    reached = 0
    for part in lines.split():
        first, _, last = part.partition("-")
        start, end = (len(output) if number == "last" else int(number) for number in (first, last or first))
        if not reached < start <= end <= len(output):
            raise ValueError(f"lines {part} of an output of {len(output)} lines, after line {reached}")
        found += [OMITTED] * (start > reached + 1) + output[start - 1 : end]
        reached = end
    return found + [OMITTED] * (reached < len(output))


def run(shown: Shown) -> list[str]:
    """The lines that a command prints to a pipe. Raises CalledProcessError."""
    if shown.without:
        shutil.rmtree(ROOT / "demo" / Path(shown.without).name, ignore_errors=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    result = subprocess.run(
        shown.run,
        shell=True,  # nosec B602  # command lines of our own documentation, with pipes
        cwd=ROOT,
        env={**os.environ, "PATH": path, "COLUMNS": "80", "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if shown.stderr else subprocess.DEVNULL,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    return [line.rstrip() for line in result.stdout.rstrip().splitlines()]


class Outputs:
    """The output of each command. A command runs once, for the first block that shows it."""

    def __init__(self) -> None:
        self._outputs: dict[tuple[str, bool], list[str]] = {}

    def of(self, shown: Shown) -> list[str]:
        key = (shown.run, shown.stderr)
        if key not in self._outputs:
            print(f"$ {shown.run}", file=sys.stderr, flush=True)
            self._outputs[key] = run(shown)
        return self._outputs[key]


def refreshed(text: str, outputs: Outputs) -> str:
    """The page with the current output in every block."""

    def replaced(match: re.Match[str]) -> str:
        shown = Shown.of(match["fields"])
        try:
            lines = [f"$ {shown.command}", *picked(outputs.of(shown), shown.lines)]
        except ValueError as error:
            raise SystemExit(f"$ {shown.command}\n{error}: the fields of its comment need new numbers") from error
        return "\n".join([f"{match['head']}```console", *lines, "```", match["end"]])

    return BLOCK.sub(replaced, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", type=Path, nargs="*", help="README.md and every page of docs/ by default")
    outputs = Outputs()
    for page in parser.parse_args().pages or pages():
        text = page.read_text()
        new = refreshed(text, outputs)
        if new != text:
            page.write_text(new)
            print(f"{page}: refreshed", file=sys.stderr)


if __name__ == "__main__":
    main()
