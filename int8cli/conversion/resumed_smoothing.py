"""The exponents that finished shards have, and the check that a resumed run goes on with the same ones.

A fold spans tensors that may lie in different shards: with other exponents in a later shard, the model would be wrong.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

from int8cli.checkpoint.reader import FileReader, open_to_read, size_of
from int8cli.checkpoint.weight_files import read_contents
from int8cli.errors import CheckpointError, SavedStateError
from int8cli.planning.exponents import NOT_SCALED, TensorExponents, are_sound, gathered, is_exponents, misfits, steps_of
from int8cli.planning.output_files import sidecar_file_name
from int8cli.records.shard_record import ShardRecord


def exponents_in(path: Path) -> dict[str, TensorExponents]:
    """The exponents in a sidecar, by the tensor that they belong to. Raises CheckpointError, SourceError."""
    with open_to_read(path) as file:
        contents = read_contents(file, "safetensors", path.name, size_of(path))
    wanted = [stored for stored in contents.tensors if is_exponents(stored.spec.name)]
    found: list[tuple[str, bytes]] = []
    with closing(FileReader(path)) as reader:
        for stored in wanted:
            data = bytearray(stored.spec.nbytes)
            reader.read_into(stored.offset_bytes, memoryview(data))
            if stored.spec.dtype != "I8" or not are_sound(bytes(data), steps_of(stored.spec.name)):
                raise CheckpointError(f"{path.name}: {stored.spec.name} is not made of exponents")
            found.append((stored.spec.name, bytes(data)))
    try:
        return gathered(found)
    except ValueError as error:
        raise CheckpointError(f"{path.name}: {error}") from error


def recorded_exponents(output: Path, records: Iterable[ShardRecord]) -> dict[str, TensorExponents]:
    """The exponents of every tensor in finished shards, also of those that are not scaled."""
    found: dict[str, TensorExponents] = {}
    for record in records:
        found |= {spec.name: NOT_SCALED for spec in record.source_tensors}
        sidecar = sidecar_file_name(record.source.output)
        if sidecar in (file.file for file in record.files[1:]):
            found |= exponents_in(output / sidecar)
    return found


def require_same(settled: Mapping[str, TensorExponents], recorded: Mapping[str, TensorExponents]) -> None:
    """Raise SavedStateError if this run found other exponents for a tensor than those that it was converted with."""
    differing = next(_differing(settled, recorded), None)
    if differing is not None:
        raise SavedStateError(
            f"the calibration now finds other exponents for {differing} than the interrupted run, whose results are "
            "lost: shards of both do not fit together",
            hint="Start over.",
        )


def require_fitting(output: Path, records: Iterable[ShardRecord]) -> None:
    """Raise SavedStateError if the finished shards do not fit together: folds are divided and multiplied alike."""
    found = list(records)
    layers = {f"{layer.name}.weight": layer.smoothing for record in found for layer in record.layers if layer.smoothing}
    smoothed = {name: layer for name, layer in layers.items() if layer.smoothed}
    misfit = next(misfits(smoothed, recorded_exponents(output, found)), None) if smoothed else None
    if misfit is not None:
        raise SavedStateError(
            f"{misfit} is multiplied by other scales than its input is divided by: its shard and that of what "
            "is in front of it come from different calibrations",
            hint="Start over.",
        )


def _differing(settled: Mapping[str, TensorExponents], recorded: Mapping[str, TensorExponents]) -> Iterator[str]:
    if recorded:
        yield from (name for name, found in settled.items() if name in recorded and recorded[name] != found)
