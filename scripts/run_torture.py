"""Run the machines of scripts/torture for as long as they are given, and print a table of what they found.

    python scripts/run_torture.py --seconds 600
    python scripts/run_torture.py --seconds 60 --seed 7 --only kills faults

The time is shared among the machines. Exits with 1 if any found something wrong.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

from torture import MACHINES, Figures

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    sys.path.append(str(ROOT / "tests"))  # for the checkpoints and the Hub stand-in of the tests
    arguments = _arguments()
    machines = arguments.only or list(MACHINES)
    share_s = arguments.seconds / len(machines)
    every: list[Figures] = []
    for name in machines:
        print(f"{name}: {share_s:.0f} s …", file=sys.stderr, flush=True)
        figures = importlib.import_module(f"torture.{name}").run(share_s, arguments.seed)
        for line in figures.found:
            print(f"{name}: {line}", file=sys.stderr, flush=True)
        every.append(figures)
    print(table(every, arguments.seed))
    sys.exit(1 if any(figures.wrong for figures in every) else 0)


def table(every: list[Figures], seed: int) -> str:
    """The figures in Markdown."""
    lines = [f"seed {seed}", "", "| machine | runs | wrong | seconds | |", "|---|--:|--:|--:|---|"]
    for figures in every:
        notes = figures.unable or "; ".join(f"{name}: {value}" for name, value in figures.measured)
        lines.append(f"| {figures.machine} | {figures.runs:,} | {figures.wrong:,} | {figures.seconds:,.0f} | {notes} |")
    runs, wrong = sum(f.runs for f in every), sum(f.wrong for f in every)
    lines.append(f"| all | {runs:,} | {wrong:,} | {sum(f.seconds for f in every):,.0f} | |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="for all machines together (600)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="what they draw their cases from")
    parser.add_argument("--only", nargs="+", choices=MACHINES, metavar="MACHINE", help=", ".join(MACHINES))
    return parser.parse_args()


if __name__ == "__main__":
    main()
