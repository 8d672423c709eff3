"""The saved state of an evaluation: the sums of each finished block.

Owns the format of these files, and which runs can resume from them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, cast

from int8cli.checkpoint.reader import read_small
from int8cli.checkpoint.writer import write_file
from int8cli.evaluation.columns import ChosenColumns
from int8cli.evaluation.options import EvaluationRun
from int8cli.evaluation.subject import Subject
from int8cli.evaluation.units import LayerSums, Trajectories
from int8cli.model.saved_states import SavedStates, read_back
from int8cli.model.text import Text
from int8cli.planning.survey import model_fingerprint
from int8cli.typed_json import parse_json, read_as


def run_identity(
    subject: Subject,
    text: Text,
    columns: ChosenColumns | None,
    options: EvaluationRun,
    trajectories: Trajectories,
    compared: Sequence[str],
) -> dict[str, Any]:
    """Everything that two runs must have in common for one to resume the other. `compared` are keys of methods."""
    chosen = "" if columns is None else json.dumps(sorted(columns.by_layer.items()))
    smoothing = sorted((columns.smoothing or {}).items()) if columns is not None else []
    exponents = [[name, each.exponents.tolist(), list(each.stored), each.steps] for name, each in smoothing]
    return {
        "smoothing": hashlib.sha256(json.dumps(exponents).encode()).hexdigest(),
        "evaluation": [method.key for method in trajectories.methods],
        "compared": list(compared),
        "model": [subject.runs.identity.name, subject.runs.identity.revision],
        "fingerprint": model_fingerprint(subject.runs, subject.shards),
        "converted": _converted_identity(subject),
        "text": text.sha256,
        "sampling": dataclasses.asdict(options.sampling),
        "columns": hashlib.sha256(chosen.encode()).hexdigest(),
        "threshold": options.threshold,
        "measured": trajectories.measured,
        "device": options.device,
    }


def save_sums(saved: SavedStates, unit: str, sums: Sequence[LayerSums]) -> None:
    """Save the sums of a block. Call it before the engine records that the block is finished."""
    document = json.dumps([dataclasses.asdict(layer) for layer in sums]).encode()
    write_file(saved.directory / f"{unit}.json", document, below=saved.below)


def load_sums(saved: SavedStates) -> Iterator[tuple[str, tuple[LayerSums, ...]]]:
    """The sums of each finished block, by its name. Raises SavedStateError if a file cannot be read."""
    for unit in saved.finished:
        with read_back(saved.directory / f"{unit}.json") as path:
            sums = read_as(cast(Any, tuple[LayerSums, ...]), parse_json(read_small(path)))
        yield unit, sums


def _converted_identity(subject: Subject) -> list[str | None]:
    converted = subject.converted
    if converted is None:
        return []
    mark = model_fingerprint(subject.source, (*converted.shards, *converted.sidecars))
    return [subject.source.identity.name, subject.source.identity.revision, mark]
