"""The files of an output, as whoever edited or damaged them may leave them: read by verify, by convert and by loaders.

Nothing that they say may lead to a file outside the output.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from unittest.mock import patch

import torch
from safetensors.torch import save
from support.program import llama

from int8cli import ConvertOptions, convert, verify
from int8cli.errors import Int8cliError
from int8cli.runtime.stored import StoredModel
from int8cli.typed_json import parse_json
from torture.fuzzing import Run, Target, WrongResultError
from torture.fuzzing.mutations import change_bytes, change_json

_OPTIONS = ConvertOptions(outliers="weights", workers=1, threads=1)


def _verified(file: str, *, is_judge: bool = False) -> Callable[[Path], tuple[list[bytes], Run]]:
    """One file of an output, by the checks of verify. Only what is as it was may pass.

    `is_judge`: a file that the others are held against, in which what no other repeats may be anything.
    """

    def prepare(scratch: Path) -> tuple[list[bytes], Run]:
        output = _converted(scratch)
        path = next(iter(sorted(output.glob(file))))
        right = path.read_bytes()

        def run(data: bytes) -> None:
            path.write_bytes(data)
            with _without_loader():
                found = verify(output)
            json.dumps(found.to_json())
            if found.passed and not is_judge and not _is_same(right, data):
                raise WrongResultError(f"another {file} passes")

        return [right], run

    return prepare


def _is_same(right: bytes, data: bytes) -> bool:
    """Whether a file says the same: of JSON, spaces and the order of fields say nothing."""
    try:
        return bool(parse_json(right) == parse_json(data))
    except ValueError:
        return right == data


def _resumed(file: str) -> Callable[[Path], tuple[list[bytes], Run]]:
    """One file of an output that is converted once more, with and without `overwrite`."""

    def prepare(scratch: Path) -> tuple[list[bytes], Run]:
        output = _converted(scratch)
        path = next(iter(sorted(output.glob(file))))
        right, whole, at_work = path.read_bytes(), scratch / "whole", scratch / "at work"
        output.rename(whole)
        (scratch / "outside.safetensors").write_bytes(b"untouched")

        def run(data: bytes) -> None:
            refusals = []
            for overwrite in (False, True):
                shutil.rmtree(at_work, ignore_errors=True)
                shutil.copytree(whole, at_work)
                (at_work / path.relative_to(output)).write_bytes(data)
                try:
                    convert(scratch / "m", at_work, ConvertOptions(outliers="weights", workers=1, overwrite=overwrite))
                except Int8cliError as error:
                    refusals.append(error)
                if sorted(each.name for each in scratch.iterdir()) != ["at work", "m", "outside.safetensors", "whole"]:
                    raise WrongResultError("files outside of the output changed")
            if len(refusals) == 2:
                raise refusals[0]

        return [right], run

    return prepare


def _sidecar(scratch: Path) -> tuple[list[bytes], Run]:
    """The stored columns as load_model takes them."""
    output = _converted(scratch)
    path = next(iter((output / "int8/outliers").glob("*.safetensors")))
    seed = path.read_bytes()

    def run(data: bytes) -> None:
        path.write_bytes(data)
        model = StoredModel(output)
        try:
            for tensor in model.state_dict().values():
                _ = tensor[...]
        finally:
            model.close()

    return [seed], run


def _loaded_shard(scratch: Path) -> tuple[list[bytes], Run]:
    """A converted shard as load_model takes it: int8 weights of any shape, scales of any."""
    output = _converted(scratch)
    for path in (output / "int8").rglob("*"):
        path.unlink() if path.is_file() else None
    (output / "model.safetensors.index.json").unlink(missing_ok=True)
    for path in output.glob("*.safetensors"):
        path.unlink()
    weight = {"q.weight": torch.ones((3, 4), dtype=torch.int8)}
    seeds = [
        save({**weight, "q.SCB": torch.ones(3), "q.weight_format": torch.tensor(0, dtype=torch.uint8)}),
        save({**weight, "q.weight_scale": torch.ones(3, 1)}),
    ]

    def run(data: bytes) -> None:
        (output / "model.safetensors").write_bytes(data)
        model = StoredModel(output)
        try:
            for tensor in model.state_dict().values():
                _ = tensor[...]
        finally:
            model.close()

    return seeds, run


def _converted(scratch: Path) -> Path:
    convert(llama(scratch / "m", layers=1, shards=2), scratch / "out", _OPTIONS)
    return scratch / "out"


@contextmanager
def _without_loader() -> Iterator[None]:
    """The loader is a target of its own: it takes a process and seconds."""
    with patch("int8cli.verification.beside.absent_packages", lambda layout: ["transformers"]):
        yield


def change_safetensors(random: Random, data: bytes, other: bytes) -> bytes:
    if random.random() < 0.5 or len(data) < 8:
        return change_bytes(random, data, other)
    length = min(int.from_bytes(data[:8], "little"), len(data) - 8)
    text = change_json(random, data[8 : 8 + length], other[8:])
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


OUTPUT_TARGETS = (
    *(
        Target(name, _verified(file, is_judge=is_judge), change_json)
        for name, file, is_judge in (
            ("conversion.json", "int8/conversion.json", True),
            ("record", "int8/records/*.json", True),
            ("files.json", "int8/files.json", True),
            ("report.json", "int8/report.json", False),
            ("output-index", "*.index.json", False),
            ("output-config", "config.json", False),
        )
    ),
    Target("verified-sidecar", _verified("int8/outliers/*.safetensors"), change_safetensors),
    Target("resumed-conversion", _resumed("int8/conversion.json"), change_json),
    Target("resumed-record", _resumed("int8/records/*.json"), change_json),
    Target("sidecar", _sidecar, change_safetensors),
    Target("loaded-shard", _loaded_shard, change_safetensors),
)
