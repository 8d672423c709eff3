"""Open the output of `convert` in several versions of transformers, and write docs/versions.md.

The environment that runs this script saves and converts tiny models of many architectures, in float16 and bfloat16.
Each of the other environments opens them, and also quantizes the source on load: the two must be equal.

    python scripts/table_of_versions.py .venv-457/bin/python .venv-500/bin/python .venv/bin/python
    python scripts/table_of_versions.py --only llama,bert .venv/bin/python    a few architectures, printed only
    python scripts/table_of_versions.py --families .venv-457/bin/python       one of every family, printed only

An environment needs torch, transformers, bitsandbytes and accelerate, for the last two columns also what int8cli needs
(int8cli itself is that of this clone), and for compressed-tensors also that package. Takes about two minutes per
environment on two cores.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(__file__).parent / "comparing_versions"
PAGE = ROOT / "docs" / "versions.md"

COLUMNS = (
    *("transformers", "bitsandbytes", "opens", "equal, bit for bit", "other precision", "compressed-tensors opens"),
    *("calibrate runs", "load_model runs"),
)
EXPLANATION = (
    "What int8cli writes opens in these versions of transformers, with bitsandbytes or compressed-tensors. Running a",
    "model (calibration, `evaluate`, `load_model`) needs transformers 5.0 or newer. For vLLM see",
    "[limits](limits.md#vllm).",
    "",
    "Tested with tiny models of many architectures, in float16 and bfloat16, saved by the newest transformers of the",
    "table and converted by int8cli. *Equal*: every tensor has the bits that quantizing the source on load gives in",
    "that version. *Other precision*: for some layers that version would choose another precision. They are floats",
    "with the source's values, as `llm_int8_skip_modules` in config.json says, or floats in a wider dtype, or int8 as",
    "bitsandbytes makes it. Architectures whose source that version cannot open either are not counted.",
)

# Why some outcomes are as they are, by version and architecture.
REASONS = {
    ("4.57.6", "git"): "its head `output` becomes int8 when it is loaded: this version reads no expressions in "
    "`llm_int8_skip_modules`, and the plain name would cover layers that are in int8",
}

Outcome = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="+", help="the interpreter of each environment, oldest transformers first")
    parser.add_argument("--only", default="", help="architectures, separated by commas; nothing is written then")
    parser.add_argument("--families", action="store_true", help="one model of every family instead; nothing is written")
    parser.add_argument("--cases", type=Path, help="where to put the cases; those that are there are used again")
    parser.add_argument("--outcomes", type=Path, help="the same for what became of them, a file for each interpreter")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)  # int8cli is that of this clone, in every environment
    with tempfile.TemporaryDirectory() as scratch:
        cases = options.cases or Path(scratch)
        if not any(cases.glob("*/case.json")):
            only = list(filter(None, options.only.split(",")))
            program = PROGRAMS / ("families.py" if options.families else "cases.py")
            subprocess.run([sys.executable, program, cases, *only], check=True, capture_output=not options.families)
        outcomes = options.outcomes or Path(scratch) / "outcomes"
        outcomes.mkdir(parents=True, exist_ok=True)
        environments = [tried(python, cases, outcomes) for python in options.pythons]
    page = "\n".join(page_of(environments))
    print(page)
    if not options.only and not options.families:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page.rstrip() + "\n", encoding="utf-8")


def tried(python: str, cases: Path, outcomes: Path) -> tuple[dict[str, str | None], list[Outcome]]:
    """The packages of one environment, and the outcome of each case in it."""
    saved = outcomes / f"{python.strip('./').replace('/', '_')}.jsonl"
    if not saved.exists():
        imports = [python, "-c", "import int8cli.cli"]
        runs = subprocess.run(imports, capture_output=True, check=False).returncode == 0
        command = [python, str(PROGRAMS / "loading.py"), str(cases), *(["--run"] if runs else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{python}: {done.stderr.strip()[-2000:]}")
        saved.write_text(done.stdout, encoding="utf-8")
    first, *rest = (json.loads(line) for line in saved.read_text("utf-8").splitlines() if line.startswith("{"))
    print(f"{python}: {len(rest)} cases", file=sys.stderr, flush=True)
    return first["packages"], rest


def page_of(environments: list[tuple[dict[str, str | None], list[Outcome]]]) -> Iterator[str]:
    yield "# What opens where"
    yield ""
    yield f"Made by `scripts/table_of_versions.py` on {datetime.date.today().isoformat()}, on the CPU."
    yield ""
    yield from EXPLANATION
    yield ""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for packages, outcomes in environments:
        yield row_of(packages, outcomes)
    yield ""
    yield from remarks(environments)


def row_of(packages: dict[str, str | None], outcomes: list[Outcome]) -> str:
    known = [outcome for outcome in outcomes if outcome["opens"] != "unknown"]
    opened = [outcome for outcome in known if outcome["opens"] == "yes"]
    equal = Counter(outcome["equal"] for outcome in opened)
    cells = [
        packages["transformers"] or "",
        packages["bitsandbytes"] or "",
        f"{len(opened)} of {len(known)}",
        str(equal["yes"]),
        str(equal["other precision"]),
        share(known, "compressed_tensors") + (f" ({packages['compressed-tensors']})"),
        share(known, "calibrate"),
        share(known, "load_model"),
    ]
    return f"| {' | '.join(cells)} |"


def share(outcomes: list[Outcome], key: str) -> str:
    tried = [outcome[key] for outcome in outcomes if key in outcome]
    return f"{tried.count('yes')} of {len(tried)}" if tried else "not tried"


def remarks(environments: list[tuple[dict[str, str | None], list[Outcome]]]) -> Iterator[str]:
    """For each version, the problems and the layers in another precision, with the architectures that have them."""
    for packages, outcomes in environments:
        yield f"## transformers {packages['transformers']}"
        yield ""
        names: dict[str, list[str]] = {}
        for outcome in outcomes:
            for remark in remarks_on(outcome):
                names.setdefault(remark, []).append(outcome["case"].rpartition("-")[0])
        for remark, found in names.items():
            architectures = list(dict.fromkeys(found))
            known = [REASONS.get((packages["transformers"] or "", each)) for each in architectures]
            reasons = "".join(f" ({reason})" for reason in dict.fromkeys(known) if reason is not None)
            yield f"- {', '.join(architectures)}: {remark}{reasons}"
        if not names:
            yield "No remarks."
        yield ""


def remarks_on(outcome: Outcome) -> Iterator[str]:
    if outcome["opens"] == "unknown":
        yield f"the source does not open either ({outcome['why'].partition(':')[0]})"
    elif outcome["opens"] == "no":
        yield f"**does not open**: {outcome['why']}"
    elif outcome["equal"] == "no":
        yield f"**not equal**: {', '.join(outcome['wrong'])}"
    elif outcome["others"]:
        yield f"another precision: {', '.join(f'`{module}`' for module in outcome['others'])}"
    for key, name in (("compressed_tensors", "compressed-tensors"), ("calibrate",) * 2, ("load_model",) * 2):
        if outcome.get(key, "yes") != "yes":
            yield f"**{name}**: {outcome[key].rpartition('Error: ')[2].removeprefix('error: ')}"


if __name__ == "__main__":
    main()
