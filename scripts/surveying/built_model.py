"""What was found about one class of transformers, as a dataclass and as a line of JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The fate of a tensor that the loader finds no parameter for.
LOST = "other:?"


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """What transformers makes of one class: its config, its tensors as saved, and what becomes of each on load.

    `fate` maps a saved name to "int8", "kept" (a linear left alone), "converted" (computed from on load, so that int8
    cannot stand there) or "other:<module class>", LOST for none; `targets` maps it to the model's parameter. `linears`,
    `left_alone`, `conv1d` and `read` (whose weight the model's own code reads) are modules of the model.
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
    read: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.model_type}/{self.class_name}{self.variant}"


def as_built_model(record: dict[str, Any]) -> BuiltModel:
    shapes = {name: tuple(shape) for name, shape in record["shapes"].items()}
    names = ("linears", "left_alone", "conv1d", "skips", "float32", "float32_in_float16", "read")
    tuples = {key: tuple(record[key]) for key in names}
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
