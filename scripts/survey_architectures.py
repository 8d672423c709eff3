"""Compare the plan with every model that the installed transformers can build: 4.57, 5.0, or later.

For each model class in transformers' auto mappings a model with few layers is built on the meta device, its tensors
are named as `save_pretrained` would name them, and `int8cli.planning.plan` decides on those names, shapes
and the config alone. The measure is what transformers' bitsandbytes path would hold in int8, and in float32. A
difference is one of these:

    FATAL    we quantize what the loader cannot hold in int8, or the skip list disagrees: the output would not load
    narrow   a float is written with fewer bits than the loader would hold of the source
    refused  we quantize a linear that the loader leaves alone (output head, tied, last module): loads, but differs
    missed   we leave alone a linear that the loader quantizes: loads, but is larger than it need be
    wide     a float is written in float32, since another version holds it so
    loaded   a float that the loader quantizes as it loads it, as transformers 4 does
    lost     transformers does not find a tensor of its own under the name that it saves it by: no output can load

    python scripts/survey_architectures.py                    everything: ten minutes, no weights, no network
    python scripts/survey_architectures.py --only llama,bert  some model types
    python scripts/survey_architectures.py --facts F.jsonl    keep what was built; reuse it when the file exists

Needs the development extras (transformers, bitsandbytes).
"""

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surveying.loader import (
    INT8_PARTS,
    default_skips,
    held_in_float32,
    naming_of,
    replaced_modules,
    without_initialization,
)

from int8cli.checkpoint.tensor import TensorSpec
from int8cli.loaders.transformers_versions import SkipRule, covers_by_name, skip_rule
from int8cli.planning.decisions import Plan, PlanOptions
from int8cli.planning.layouts.skip_modules import skip_modules
from int8cli.planning.plan import kind_of, make_plan

BUILD_LIMIT_S = 60
LOST = "other:?"
TIE_FLIPPED = " (tie_word_embeddings flipped)"
MEMORY_LIMIT_BYTES = 6 << 30

# What makes a default config large without adding new kinds of names to the checkpoint.
COUNTS_TO_SHRINK = {
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "num_encoder_layers": 4,
    "num_decoder_layers": 4,
    "depth": 4,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "moe_num_experts": 8,
}

# What some default configs leave open and their models need.
GAPS = {
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "prediction_length": 24,
    "vocab_size": 320,
    "vocabulary_map": {},
}


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """What transformers makes of one class: its config, its tensors as saved, and what becomes of each on load.

    `fate` maps a saved name to "int8", "kept" (a linear left alone), "converted" (computed from on load, so that int8
    cannot stand there) or "other:<module class>", LOST for none; `targets` maps it to the model's parameter. `linears`,
    `left_alone` and `conv1d` are modules of the model.
    """

    model_type: str
    class_name: str
    variant: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    fate: dict[str, str]
    targets: dict[str, str]
    linears: tuple[str, ...]
    left_alone: tuple[str, ...]
    conv1d: tuple[str, ...]
    skips: tuple[str, ...]
    float32: tuple[str, ...]
    float32_in_float16: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.model_type}/{self.class_name}{self.variant}"


# Building, in a child process


def class_names_by_model_type() -> dict[str, list[str]]:
    """Every model class that an auto class would build, by model type."""
    from transformers.models.auto import modeling_auto

    found: dict[str, set[str]] = defaultdict(set)
    for attribute, mapping in vars(modeling_auto).items():
        if not (attribute.startswith("MODEL_") and attribute.endswith("MAPPING_NAMES")):
            continue
        for model_type, names in mapping.items():
            found[model_type].update([names] if isinstance(names, str) else names)
    return {model_type: sorted(filter(None, names)) for model_type, names in sorted(found.items())}


def adapt(config: Any, small: bool) -> None:
    """Fill what a config and those inside it leave open, and lower their numbers of layers, in place."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            adapt(value, small)
        elif value is None and key in GAPS:
            setattr(config, key, GAPS[key])
        elif small and key in COUNTS_TO_SHRINK and type(value) is int:
            with contextlib.suppress(Exception):  # a config may refuse; it is then built at its own size
                setattr(config, key, min(value, COUNTS_TO_SHRINK[key]))


def configure(model_class: Any, config_class: Any, variant: str) -> Any:
    """A default config for a model class: the text model's own where the class wants only that."""
    config = config_class()
    if not isinstance(config, model_class.config_class):
        text_config = config.get_text_config()
        config = text_config if isinstance(text_config, model_class.config_class) else config
    if variant == TIE_FLIPPED:
        config.tie_word_embeddings = not config.tie_word_embeddings
    return config


@contextlib.contextmanager
def laid_out_in_bfloat16() -> Iterator[None]:
    """As the loader builds a model of that dtype: what a class makes in float32 shows."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), without_initialization():
            yield
    finally:
        torch.set_default_dtype(before)


def build(class_name: str, config_class: Any, variant: str) -> Any:
    """The model on the meta device, small if its config allows it, at its default size otherwise."""
    import transformers

    model_class = getattr(transformers, class_name)
    for small in (True, False):
        try:
            config = configure(model_class, config_class, variant)
            adapt(config, small)
            with laid_out_in_bfloat16():
                return model_class(config)
        except Exception:
            if not small:
                raise
    raise AssertionError("unreachable")


def conv1d_modules(model: Any) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if isinstance(module, Conv1D)]


def fates(model: Any, naming: Any, int8_modules: set[str], linears: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What becomes of each saved tensor when the loader quantizes, and where it goes."""
    int8 = {f"{name}.weight" for name in int8_modules}
    modules = dict(model.named_modules())
    fate, targets = {}, {}
    for name in naming.saved:
        target, changed = naming.target(name)
        targets[name] = target
        module_name, _, leaf = target.rpartition(".")
        companions = [naming.target(f"{name.rpartition('.')[0]}.{part}") for part in INT8_PARTS]
        as_weight = (target, False) if hasattr(naming, "converters") else None
        if changed or (target in int8 and as_weight and any(companion != as_weight for companion in companions)):
            fate[name] = "converted"
        elif target in int8:
            fate[name] = "int8"
        elif leaf == "weight" and module_name in linears:
            fate[name] = "kept"
        else:
            owner = modules.get(module_name)
            fate[name] = f"other:{type(owner).__name__ if owner is not None else '?'}"
    return fate, targets


def describe(model_type: str, class_name: str, model: Any) -> dict[str, Any]:
    """A BuiltModel as JSON."""
    naming = naming_of(model)
    skips = default_skips(model)
    linears = sorted(replaced_modules(model, []))
    int8_modules = replaced_modules(model, skips)
    fate, targets = fates(model, naming, int8_modules, linears)
    model.config.architectures = [class_name]
    return {
        "model_type": model_type,
        "class_name": class_name,
        "variant": "",
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "shapes": {name: list(tensor.shape) for name, tensor in naming.saved.items()},
        "dtypes": {n: "BF16" if t.is_floating_point() else "I64" for n, t in naming.saved.items()},
        "fate": fate,
        "targets": targets,
        "linears": linears,
        "left_alone": [name for name in linears if name not in int8_modules],
        "conv1d": conv1d_modules(model),
        "skips": skips,
        "float32": held_in_float32(model, "bfloat16"),
        "float32_in_float16": held_in_float32(model, "float16"),
    }


def build_model_type(task: tuple[str, list[str], str]) -> None:
    """Build each class of one model type and append what was found to a file; run in a child of its own."""
    model_type, class_names, path = task
    from transformers import CONFIG_MAPPING

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    with open(path, "a", encoding="utf-8") as out:
        for class_name in class_names:
            signal.alarm(BUILD_LIMIT_S)  # ends the child: what comes after it counts as neither built nor unbuilt
            try:
                model = build(class_name, CONFIG_MAPPING[model_type], "")
                lines = [describe(model_type, class_name, model)]
                if model.get_output_embeddings() is not None and hasattr(model.config, "tie_word_embeddings"):
                    model = build(class_name, CONFIG_MAPPING[model_type], TIE_FLIPPED)
                    lines.append(describe(model_type, class_name, model) | {"variant": TIE_FLIPPED})
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                reason = f"{type(error).__name__}: {str(error)[:120]} ({Path(where.filename).name}:{where.lineno})"
                lines = [{"model_type": model_type, "class_name": class_name, "unbuilt": reason}]
            out.writelines(json.dumps(line) + "\n" for line in lines)
            out.flush()


def collect(only: set[str], path: Path, processes: int) -> None:
    """Build everything, each model type in its own forked child so that none can take the survey down."""
    import torch
    import transformers.integrations.bitsandbytes  # noqa: F401  (before forking, so that each child starts at once)

    torch.set_num_threads(1)
    tasks = [(t, n, str(path)) for t, n in class_names_by_model_type().items() if not only or t in only]
    context = multiprocessing.get_context("fork")
    running: list[Any] = []
    for task in tasks:
        while len(running) >= processes:
            running[0].join(0.05)
            running = [p for p in running if p.is_alive()]
        child = context.Process(target=build_model_type, args=(task,))
        child.start()
        running.append(child)
    for child in running:
        child.join()


# Comparing


def as_built_model(record: dict[str, Any]) -> BuiltModel:
    shapes = {name: tuple(shape) for name, shape in record["shapes"].items()}
    tuples = {
        key: tuple(record[key]) for key in ("linears", "left_alone", "conv1d", "skips", "float32", "float32_in_float16")
    }
    return BuiltModel(**record | tuples | {"shapes": shapes})


def read_facts(path: Path) -> tuple[list[BuiltModel], list[dict[str, str]]]:
    built, unbuilt = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "unbuilt" in record:
            unbuilt.append(record)
            continue
        built.append(as_built_model(record))
    return built, unbuilt


def plan_for(model: BuiltModel) -> Plan:
    specs = [TensorSpec(name, model.dtypes[name], shape) for name, shape in model.shapes.items()]
    return make_plan(specs, model.config, PlanOptions())


def differences(model: BuiltModel, plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    """(severity, kind, what the loader makes of it, our reason) for each tensor on which plan and loader differ."""
    for decision in plan.decisions:
        fate = model.fate[decision.spec.name]
        if fate == LOST:
            yield "lost", decision.kind, fate, decision.reason
            continue
        conv1d = model.targets[decision.spec.name].removesuffix(".weight") in model.conv1d
        if decision.quantize and decision.transpose != conv1d:
            yield "FATAL", decision.kind, "Conv1D" if conv1d else "nn.Linear", "transposed the wrong way"
        if decision.quantize and fate not in ("int8", "kept"):
            yield "FATAL", decision.kind, fate, decision.reason
        elif decision.quantize and fate == "kept":
            yield "refused", decision.kind, fate, decision.reason
        elif not decision.quantize and fate == "int8" and decision.spec.numel:
            yield "missed", decision.kind, fate, decision.reason


def skip_differences(model: BuiltModel, plan: Plan, rule: SkipRule) -> Iterator[tuple[str, str, str, str]]:
    """The same for `llm_int8_skip_modules`: would the loader then make int8 layers exactly where the file has int8?"""
    skips = skip_modules(plan)
    planned = {model.targets[d.spec.name].removesuffix(".weight") for d in plan.quantized}
    floats = {model.targets[d.spec.name].removesuffix(".weight") for d in plan.copied}
    if LOST in model.fate.values():  # which modules the others would fill is not known
        return
    for name in model.linears:
        converts = not any(rule(entry, name) for entry in skips)
        if converts and name not in planned:
            quantizes = rule is covers_by_name and name in floats
            severity = "loaded" if quantizes else "FATAL"
            yield severity, kind_of(name), "skip list", "llm_int8_skip_modules does not cover a linear left alone"
        elif not converts and name in planned:
            yield "FATAL", kind_of(name), "skip list", "llm_int8_skip_modules covers a linear that was quantized"


def dtype_differences(model: BuiltModel) -> Iterator[tuple[str, str, str, str]]:
    """The same for the floats: is what stays one written in the dtype in which the loader holds it?

    "narrow": the file has fewer bits than a load of the source would hold. "wide": more, and the same values.
    """
    for dtype, float32 in (("BF16", model.float32), ("F16", model.float32_in_float16)):
        named = {"BF16": "bfloat16", "F16": "float16"}[dtype]
        dtypes = {name: dtype if known == "BF16" else known for name, known in model.dtypes.items()}
        specs = [TensorSpec(name, dtypes[name], shape) for name, shape in model.shapes.items()]
        for decision in make_plan(specs, {**model.config, "dtype": named}, PlanOptions()).copied:
            if not decision.spec.name.endswith(".weight") or decision.spec.dtype != dtype:
                continue
            wanted = "F32" if model.targets[decision.spec.name] in float32 else dtype
            if decision.written_dtype != wanted:
                severity = "narrow" if wanted == "F32" else "wide"
                yield severity, decision.kind, f"{wanted} of {named}", f"written in {decision.written_dtype}"


def report(built: list[BuiltModel], unbuilt: list[dict[str, str]], version: str, quiet: bool) -> int:
    severities = ("FATAL", "lost", "narrow", "refused", "missed", "wide", "loaded")
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
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quiet", action="store_true", help="do not list what could not be built")
    options = parser.parse_args()
    only = set(filter(None, options.only.split(",")))
    version = importlib.metadata.version("transformers")
    with tempfile.TemporaryDirectory() as scratch:
        facts = options.facts or Path(scratch) / "facts.jsonl"
        if not facts.exists():
            collect(only, facts, options.processes)
        built, unbuilt = read_facts(facts)
    if only:
        built = [model for model in built if model.model_type in only]
    return 1 if report(built, unbuilt, version, options.quiet) else 0


if __name__ == "__main__":
    sys.exit(main())
