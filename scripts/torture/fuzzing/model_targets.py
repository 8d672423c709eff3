"""What is read to run a model: its config and its tokenizer's files by transformers, statistics, and saved states."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from random import Random
from unittest.mock import patch

import torch
from support.calibration_models import WORDS, make_model

from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.weight_files import find_weights, read_headers
from int8cli.errors import SavedStateError
from int8cli.llm_int8.inputs import InputStatistics
from int8cli.model.sampling import Sampling
from int8cli.model.saved_states import SavedStates
from int8cli.model.skeleton import build_skeleton
from int8cli.model.text import Text, sequences_of
from int8cli.outliers.statistics import (
    NORM_FED,
    LinearStatistics,
    OutlierStatistics,
    Provenance,
    SiteStatistics,
)
from int8cli.outliers.statistics_file import load_statistics, save_statistics
from int8cli.report.outliers_json import statistics_to_json
from torture.fuzzing import Run, Target
from torture.fuzzing.mutations import change_bytes, change_json
from torture.fuzzing.output_targets import change_safetensors


def _tokenizer(file: str) -> Callable[[Path], tuple[list[bytes], Run]]:
    def prepare(scratch: Path) -> tuple[list[bytes], Run]:
        model = make_model("llama", scratch / "m")
        from int8cli.model.config import read_config

        config, path = read_config(model), model / file
        text = Text.decode("text", " ".join(WORDS * 20).encode())

        def run(data: bytes) -> None:
            path.write_bytes(data)
            with _silenced():
                sequences_of(text, model, config, Sampling(64, 16, 0))

        return [path.read_bytes()], run

    return prepare


def _model_config(scratch: Path) -> tuple[list[bytes], Run]:
    model = make_model("llama", scratch / "m")
    source = DirectorySource(model)
    shards = read_headers(source, find_weights(source))
    specs = {stored.spec.name: stored.spec for contents in shards for stored in contents.tensors}
    path = model / "config.json"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with _silenced():
            build_skeleton(model, specs)

    return [path.read_bytes()], run


def _statistics(scratch: Path) -> tuple[list[bytes], Run]:
    inputs = InputStatistics(8)
    inputs.update(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)))
    linear = LinearStatistics("h.0.q", 4, 8, torch.ones(8), 8.0, 2.0, (1, 5), 0.1, 0.05)
    site = SiteStatistics("h.0.input", NORM_FED, "h", 0, inputs.summary(), (linear,))
    provenance = Provenance("org/m", None, "", "text", "0" * 64, 12, 4, 0, "float32", 6.0)
    path = scratch / "statistics.safetensors"
    save_statistics(OutlierStatistics(provenance, (site,)), path)
    seed = path.read_bytes()

    def run(data: bytes) -> None:
        path.write_bytes(data)
        json.dumps(statistics_to_json(load_statistics(path)))

    return [seed], run


def _state(part: str) -> Callable[[Path], tuple[list[bytes], Run]]:
    """The state between blocks: what cannot be read back is an error, or makes the run start over."""

    def prepare(scratch: Path) -> tuple[list[bytes], Run]:
        directory = scratch / "blocks"

        def saved() -> SavedStates:
            states = SavedStates(directory, {"run": 1})
            if not states.resumed:
                states.put("layers", "0", 1, 0, {"hidden": torch.ones(4, 8), "mask": None})
                states.finish("layers", "0", 1)
            return states

        saved().close()
        path = directory / part
        seed = path.read_bytes()

        def run(data: bytes) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            states = saved()
            try:
                states.get("layers", 0)
            except KeyError as error:
                raise SavedStateError("the record names no block of the stack") from error
            finally:
                states.close()

        return [seed], run

    return prepare


@contextmanager
def _silenced() -> Iterator[None]:
    """What transformers prints of its own is not looked at here."""
    with patch("sys.stderr", StringIO()):
        yield


def change_text(random: Random, data: bytes, other: bytes) -> bytes:
    return change_json(random, data, other) if random.random() < 0.9 else change_bytes(random, data, other)


MODEL_TARGETS = (
    Target("tokenizer.json", _tokenizer("tokenizer.json"), change_text),
    Target("tokenizer_config.json", _tokenizer("tokenizer_config.json"), change_text),
    Target("model-config", _model_config, change_json),
    Target("statistics", _statistics, change_safetensors),
    Target("state-record", _state("record.json"), change_json),
    Target("state", _state("0@1/0.pt"), change_bytes),
)
