"""Compare int8cli with `cp` of the same files and with other converters, in turn, and print tables in Markdown.

Makes its own checkpoints: blocks of BLOOM for the comparison with `cp`, and blocks of Llama-2-7B, which other
converters support, for the comparison with them. A conversion ends when its output is on disk, like `cp` with `sync`.

    python scripts/benchmark.py --gigabytes 8 --runs 5
    python scripts/benchmark.py --peers 2 --runs 3
    python scripts/benchmark.py --growth 0.1 0.3 1 3 10

Needs an idle machine, with three times the checkpoint's size free on the disk and twice its size in memory.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarking.cases import Bench, Section
from benchmarking.machine import describe_machine
from benchmarking.tables import against_copy, growth, peers

BUILD = Path("build")  # git ignores it, and `make clean` removes it


def main() -> None:
    arguments = _arguments()
    machine = describe_machine()
    print(machine, end="\n\n", flush=True)
    sections: list[Section] = []
    arguments.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        bench = Bench(Path(scratch), arguments.runs)
        if arguments.gigabytes:
            sections.append(bench.against_copy(arguments.gigabytes))
            print(against_copy(sections[-1]), flush=True)
        if arguments.peers:
            sections.append(bench.against_peers(arguments.peers, arguments.environments))
            print(peers(sections[-1]), flush=True)
        if arguments.growth:
            sections.append(bench.growth(arguments.growth))
            print(growth(sections[-1]), flush=True)
    if arguments.json:
        document = {"machine": machine, "sections": [asdict(section) for section in sections]}
        arguments.json.write_text(json.dumps(document, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0, help="compare with cp, on a checkpoint of this size")
    parser.add_argument("--peers", type=float, default=0, metavar="GIGABYTES", help="compare with other converters")
    parser.add_argument("--growth", type=float, nargs="+", default=[], metavar="GIGABYTES", help="cost at these sizes")
    parser.add_argument("--runs", type=int, default=5, help="runs of each command; the tables show medians")
    parser.add_argument("--directory", type=Path, default=BUILD, help="where to write (build)")
    parser.add_argument(
        "--environments", type=Path, default=BUILD / "peers", help="where to install other converters (build/peers)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every run to this file")
    arguments = parser.parse_args()
    if not (arguments.gigabytes or arguments.peers or arguments.growth):
        parser.error("say what to measure: --gigabytes, --peers or --growth")
    return arguments


if __name__ == "__main__":
    main()
