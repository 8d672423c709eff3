"""Builds every model of the installed transformers on the meta device, and describes each as a line of JSON.

Knows transformers, and nothing of int8cli. comparing.py holds the plan against what is found here.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surveying.built_model import LOST, BuiltModel, read_facts
from surveying.loader import (
    INT8_PARTS,
    default_skips,
    held_in_float32,
    naming_of,
    replaced_modules,
    without_initialization,
)
from surveying.reading import linears_read

TIE_FLIPPED = " (tie_word_embeddings flipped)"
BUILD_LIMIT_S = 60
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
            fate[name] = f"other:{type(owner).__name__}" if hasattr(owner, leaf) else LOST
    return fate, targets


def describe(model_type: str, class_name: str, model: Any, saved: BuiltModel | None = None) -> dict[str, Any]:
    """A BuiltModel as JSON. With `saved`, what becomes of the same model as another version has saved it."""
    naming = naming_of(model) if saved is None else replace(naming_of(model), saved=tensors_of(saved))
    skips = default_skips(model)
    linears = sorted(replaced_modules(model, []))
    int8_modules = replaced_modules(model, skips)
    fate, targets = fates(model, naming, int8_modules, linears)
    model.config.architectures = [class_name]
    return {
        "model_type": model_type,
        "class_name": class_name,
        "variant": "",
        "config": json.loads(model.config.to_json_string(use_diff=False)) if saved is None else saved.config,
        "shapes": {name: list(tensor.shape) for name, tensor in naming.saved.items()},
        "dtypes": {n: "BF16" if t.is_floating_point() else "I64" for n, t in naming.saved.items()},
        "fate": fate,
        "targets": targets,
        "linears": linears,
        "left_alone": [name for name in linears if name not in int8_modules],
        "read": linears_read(model, linears),
        "conv1d": conv1d_modules(model),
        "skips": skips,
        "float32": held_in_float32(model, "bfloat16"),
        "float32_in_float16": held_in_float32(model, "float16"),
    }


def tensors_of(saved: BuiltModel) -> dict[str, Any]:
    """The saved tensors on the meta device."""
    import torch

    dtypes = {"BF16": torch.bfloat16, "I64": torch.int64}
    return {
        name: torch.empty(shape, dtype=dtypes[saved.dtypes[name]], device="meta")
        for name, shape in saved.shapes.items()
    }


def described(
    model_type: str, class_name: str, config_class: Any, saved: Mapping[str, BuiltModel]
) -> Iterator[dict[str, Any]]:
    """What is found about a class, also with its head tied where it is not, or the other way round.

    `saved` has what another version saved, by label; then only those.
    """
    for variant in ("", TIE_FLIPPED):
        before = saved.get(f"{model_type}/{class_name}{variant}")
        if saved and before is None:
            continue
        model = build(class_name, config_class, variant)
        yield describe(model_type, class_name, model, before) | {"variant": variant}
        if model.get_output_embeddings() is None or not hasattr(model.config, "tie_word_embeddings"):
            return


def build_model_type(model_type: str, class_names: list[str], path: Path, saved: Mapping[str, BuiltModel]) -> None:
    """Build each class of one model type and append what was found to a file; run in a child of its own."""
    from transformers import CONFIG_MAPPING

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    with open(path, "a", encoding="utf-8") as out:
        for class_name in class_names:
            signal.alarm(BUILD_LIMIT_S)  # ends the child: what comes after it counts as neither built nor unbuilt
            try:
                lines = list(described(model_type, class_name, CONFIG_MAPPING[model_type], saved))
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                reason = f"{type(error).__name__}: {str(error)[:120]} ({Path(where.filename).name}:{where.lineno})"
                lines = [{"model_type": model_type, "class_name": class_name, "unbuilt": reason}]
            out.writelines(json.dumps(line) + "\n" for line in lines)
            out.flush()


def collect(only: set[str], path: Path, processes: int, saved_by: Path | None) -> None:
    """Build everything, each model type in its own forked child so that none can take the survey down.

    `saved_by` is what was collected with another version: the names and configs that it saves.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported; some configs ask the Hub for another one
    import torch
    import transformers.integrations.bitsandbytes  # noqa: F401  (before forking, so that each child starts at once)

    torch.set_num_threads(1)
    tasks = [(t, n) for t, n in class_names_by_model_type().items() if not only or t in only]
    saved = {} if saved_by is None else {model.label: model for model in read_facts(saved_by)[0]}
    context = multiprocessing.get_context("fork")
    running: list[Any] = []
    for task in tasks:
        while len(running) >= processes:
            running[0].join(0.05)
            running = [p for p in running if p.is_alive()]
        child = context.Process(target=build_model_type, args=(*task, path, saved))
        child.start()
        running.append(child)
    for child in running:
        child.join()
