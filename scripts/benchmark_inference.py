"""Prefill and decode of a model: 16 bit, bitsandbytes, load_model, torchao and vLLM, in turns, each in its own process.

    python scripts/benchmark_inference.py demo/SmolLM2-135M-Instruct demo/SmolLM2-135M-Instruct-int8
    python scripts/benchmark_inference.py SOURCE INT8 --plain INT8_WITHOUT_COLUMNS --device cuda --json figures.json
    python scripts/benchmark_inference.py SOURCE INT8 --compressed DIR --vllm-python .venv-vllm/bin/python

`--plain` is a conversion without stored columns, `--compressed` one in the layout compressed-tensors, for vLLM. vLLM
and torchao are measured where the Python of an environment that has them is given. A figure is the best of some rounds,
in which the methods take turns, one run at a time, so that what else the machine does meets all of them. 16 bit takes
part in every run, and ratios are to its figures in the same run. With `--json`, rows that the file has already are kept
unless they are measured again, so that `--rows` can measure some at a time.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from int8cli.results.units import human_bytes

SIXTEEN_BIT = "transformers, 16 bit"
_SUBJECT = Path(__file__).parent / "inference_subject.py"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: the method of `inference_subject.py`, on which directory, by which Python."""

    name: str
    method: str
    directory: Path
    python: Path


@dataclass(frozen=True, slots=True)
class Figures:
    """A row's best times in milliseconds, of a prefill by its tokens and of a decode step by its batch.

    `faster` has the same keys, and how many times as fast as 16 bit that is, in the same run. 0 bytes of weights are
    unknown.
    """

    method: str
    weights_bytes: int
    peak_bytes: int
    ms: dict[str, float]
    faster: dict[str, float]


def rows(arguments: argparse.Namespace) -> list[Row]:
    """All rows that the arguments allow, or 16 bit and those of `--rows`, in the order of the table."""
    here, source, int8 = Path(sys.executable), arguments.source, arguments.int8
    found = [
        Row(SIXTEEN_BIT, "16 bit", source, here),
        Row("bitsandbytes, threshold 6", "bitsandbytes", int8, here),
        Row("bitsandbytes, threshold 0", "bitsandbytes, threshold 0", source, here),
        Row("load_model, zero-point", "zeropoint", int8, here),
        Row("load_model, absmax", "absmax", int8, here),
    ]
    if arguments.plain is not None:
        found.append(Row("load_model, zero-point, no columns", "zeropoint", arguments.plain, here))
        found.append(Row("load_model, absmax, no columns", "absmax", arguments.plain, here))
    if arguments.torchao_python is not None:
        found.append(Row("torchao, int8 dynamic", "torchao", source, arguments.torchao_python))
    if arguments.vllm_python is not None:
        found.append(Row("vLLM, 16 bit", "vllm", source, arguments.vllm_python))
        if arguments.compressed is not None:
            found.append(Row("vLLM, int8", "vllm", arguments.compressed, arguments.vllm_python))
    if arguments.rows is None:
        return found
    unknown = set(arguments.rows) - {row.name for row in found}
    if unknown:
        sys.exit(f"no such row: {', '.join(sorted(unknown))}. Rows: {'; '.join(row.name for row in found)}")
    return [row for row in found if row.name in (SIXTEEN_BIT, *arguments.rows)]


class Running:
    """A row's process, waiting for something to measure. Ends with the `with` block."""

    def __init__(self, row: Row, arguments: argparse.Namespace) -> None:
        threads = str(arguments.threads)
        command = [row.python, _SUBJECT, row.method, row.directory, arguments.device, threads]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "TRANSFORMERS_VERBOSITY": "error"},
        )
        self.row, self.peak_bytes = row, 0
        self.weights_bytes = int(self._answer()["weights_bytes"])

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def seconds(self, what: str, size: int) -> float:
        assert self._process.stdin is not None
        print(json.dumps([what, size]), file=self._process.stdin, flush=True)
        answer = self._answer()
        self.peak_bytes = int(answer["peak_bytes"])
        return float(answer["seconds"])

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.row.name}: ended with exit code {self._process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer


def measure(chosen: Sequence[Row], arguments: argparse.Namespace) -> list[Figures]:
    wanted = [("prefill", size) for size in arguments.tokens] + [("decode", size) for size in arguments.batches]
    with ExitStack() as stack:
        running = [stack.enter_context(Running(row, arguments)) for row in chosen]
        best = {f"{what} {size}": in_turns(running, what, size, arguments.rounds) for what, size in wanted}
        return [
            Figures(
                each.row.name,
                each.weights_bytes,
                each.peak_bytes,
                {key: 1000 * seconds[each.row.name] for key, seconds in best.items()},
                {key: seconds[SIXTEEN_BIT] / seconds[each.row.name] for key, seconds in best.items()},
            )
            for each in running
        ]


def in_turns(running: Sequence[Running], what: str, size: int, rounds: int) -> dict[str, float]:
    """The best of all rounds for each, the rows taking turns. What runs for the first time is not counted."""
    for each in running:
        each.seconds(what, size)
    best = {each.row.name: float("inf") for each in running}
    for _ in range(rounds):
        for each in running:
            best[each.row.name] = min(best[each.row.name], each.seconds(what, size))
    return best


def merged(found: Sequence[Figures], file: Path) -> list[Figures]:
    """`found` and the rows of the file that are not in it; the file is written again."""
    before = [Figures(**each) for each in json.loads(file.read_text())] if file.exists() else []
    new = {each.method: each for each in found}
    rows = [new.pop(each.method, each) for each in before] + list(new.values())
    file.write_text(json.dumps([asdict(each) for each in rows], indent=2) + "\n")
    return rows


def show(found: Sequence[Figures]) -> None:
    """Milliseconds and, in brackets, how many times as fast as 16 bit."""
    keys = list(dict.fromkeys(key for each in found for key in each.ms))
    print("| | weights | peak | " + " | ".join(keys) + " |")
    print("|---" * (3 + len(keys)) + "|")
    for each in found:
        cells = [human_bytes(each.weights_bytes) if each.weights_bytes else "", human_bytes(each.peak_bytes)]
        cells += [f"{each.ms[key]:,.1f} ({each.faster[key]:.2f})" if key in each.ms else "" for key in keys]
        print(f"| {each.method} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("int8", type=Path)
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--compressed", type=Path)
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--torchao-python", type=Path)
    parser.add_argument("--rows", nargs="+", help="names of rows beside 16 bit; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(rows(arguments), arguments)
    show(found if arguments.json is None else merged(found, arguments.json))


if __name__ == "__main__":
    main()
