"""Compare the plan with every model that the installed transformers can build: 4.57, 5.0, or later.

For each model class in transformers' auto mappings a model with few layers is built on the meta device, its tensors
are named as `save_pretrained` would name them, and `int8cli.planning.plan` decides on those names, shapes
and the config alone. The measure is what transformers' bitsandbytes path would hold in int8, and in float32. A
difference is one of these:

    FATAL    we quantize what the loader cannot hold in int8, or the skip list disagrees: the output would not load
    READ     we quantize a linear whose weight the model's own code reads: the output may not run
    narrow   a float is written with fewer bits than the loader would hold of the source
    refused  we quantize a linear that the loader leaves alone (output head, tied, last module): loads, but differs
    missed   we leave alone a linear that the loader quantizes: loads, but is larger than it need be
    wide     a float is written in float32, since another version holds it so
    loaded   a float that the loader quantizes as it loads it, as transformers 4 does
    lost     transformers does not find a tensor of its own under the name that it saves it by: no output can load

    python scripts/survey_architectures.py                    everything: ten minutes, no weights, no network
    python scripts/survey_architectures.py --only llama,bert  some model types
    python scripts/survey_architectures.py --facts F.jsonl    keep what was built; reuse it when the file exists
    python scripts/survey_architectures.py --saved-by F.jsonl the checkpoints are those of the version that made F

Needs the development extras (transformers, bitsandbytes).
"""

import argparse
import importlib.metadata
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from surveying.building import collect
from surveying.built_model import BuiltModel, read_facts
from surveying.comparing import differences, dtype_differences, plan_for, skip_differences

from int8cli.loaders.transformers_versions import skip_rule


def report(built: list[BuiltModel], unbuilt: list[dict[str, str]], version: str, quiet: bool) -> int:
    severities = ("FATAL", "READ", "lost", "narrow", "refused", "missed", "wide", "loaded")
    rule = skip_rule(version)
    by_class: dict[str, str] = {}
    rows: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for model in built:
        plan = plan_for(model)
        found = [*differences(model, plan), *skip_differences(model, plan, rule), *dtype_differences(model)]
        by_class[model.label] = next((s for s in severities if any(f[0] == s for f in found)), "agree")
        for row in sorted(set(found)):
            rows[row].append(model.label)
    for row in sorted(rows, key=lambda r: (severities.index(r[0]), rows[r][0])):
        names = rows[row]
        print(
            f"{row[0]:8}{row[1]}  [{row[2]}] ours: {row[3]}  <- {', '.join(names[:3])}",
            f"(+{len(names) - 3})" if len(names) > 3 else "",
        )
    if not quiet:
        for record in unbuilt:
            print(f"unbuilt  {record['model_type']}/{record['class_name']}: {record['unbuilt']}")
    counts = Counter(by_class.values())
    print(f"\n{len(built)} classes built, {len(unbuilt)} could not be built by transformers {version}: {dict(counts)}")
    return counts["FATAL"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Hold the plan against every model that transformers can build.")
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument("--facts", type=Path, help="file for what was built; reused when it exists")
    parser.add_argument("--saved-by", type=Path, help="the --facts of another version: its checkpoints are opened")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quiet", action="store_true", help="do not list what could not be built")
    options = parser.parse_args()
    only = set(filter(None, options.only.split(",")))
    version = importlib.metadata.version("transformers")
    with tempfile.TemporaryDirectory() as scratch:
        facts = options.facts or Path(scratch) / "facts.jsonl"
        if not facts.exists():
            collect(only, facts, options.processes, options.saved_by)
        built, unbuilt = read_facts(facts)
    if only:
        built = [model for model in built if model.model_type in only]
    return 1 if report(built, unbuilt, version, options.quiet) else 0


if __name__ == "__main__":
    sys.exit(main())
