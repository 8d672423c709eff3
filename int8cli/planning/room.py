"""The disk space that a conversion needs: its output, and the shards that are on the disk at once.

Owns how many of them are counted. Needs no torch.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.source import Source
from int8cli.checkpoint.writer import bytes_on_disk, existing_parent, free_bytes
from int8cli.planning.survey import Survey

# Measured on SmolLM2: record, report and index need 684 bytes for each tensor.
_RECORD_BYTES_A_TENSOR = 1000
# And 289 bytes for each stored column with its figures.
_RECORD_BYTES_A_COLUMN = 500


@dataclass(frozen=True, slots=True)
class AtOnce:
    """How many shards are on the disk at the same time.

    `outputs`: those of the output; None if all stay. `downloads`: those of the source, which may be any of them; None
    for the one that is converted and the one after it. `elsewhere`: other processes download, each under names of its
    own. None of them resumes a download of this one, and a run of the model has shards of its own beside theirs.
    """

    outputs: int | None = None
    downloads: int | None = None
    elsewhere: bool = False


ONE_PROCESS = AtOnce()


@dataclass(frozen=True, slots=True)
class Room:
    """The free space that a disk needs, and what it has. `directory` is on that disk."""

    directory: Path
    needed_bytes: int
    free_bytes: int


def room_needed(
    source: Source,
    survey: Survey,
    remaining: Sequence[str],
    output: Path,
    at_once: AtOnce,
    model_bytes: int = 0,
    left_over: Sequence[Path] = (),
) -> tuple[Room, ...]:
    """The free space that each disk needs to convert the `remaining` shards; one entry for each disk.

    Counts the output and, for a Hub source, the downloaded shards that exist at once, or all if the source keeps them.
    Shards in the Hub cache need nothing. A run of the model downloads `model_bytes` at most beside what is there.
    Of what an interrupted run has left, a download that is resumed takes only its rest, and is there until the turn of
    its shard. Everything else in the directories `left_over` counts as free: it is removed first.
    """
    kept = kept_downloads(source, survey, remaining, at_once)
    sizes = {contents.file_name: contents.file_bytes for contents in survey.shards}
    begun = {name: bytes_on_disk(paths) for name, paths in kept.items()}
    shards = [
        _Shard(
            survey.outputs[name].file_bytes + _sidecar_bytes(survey, name),
            sizes[name] if source.transfers(name) else 0,
            begun.get(name, 0),
        )
        for name in remaining
    ]
    needed = [(output, other_files_bytes(source, survey))]
    if source.keeps_in is not None:
        needed.append((source.keeps_in, sum(max(0, shard.source_bytes - shard.begun_bytes) for shard in shards)))
        needed.append((output, _outputs_bytes(shards, at_once)))
    else:
        needed.append((output, _most_in_turn(shards, at_once, model_bytes)))
    return _by_disk(needed, left_over, {path for paths in kept.values() for path in paths})


def model_download_bytes(source: Source, survey: Survey) -> int:
    """The downloads that a run of the model probably has at once: the shard that is read, and the one after it.

    It tells more exactly once the model is built: some models read several shards at once.
    """
    sizes = [contents.file_bytes if source.transfers(contents.file_name) else 0 for contents in survey.shards]
    return _pair_bytes(sizes)


def kept_downloads(
    source: Source, survey: Survey, remaining: Collection[str], at_once: AtOnce
) -> Mapping[str, tuple[Path, ...]]:
    """Where downloads are that this run resumes, if they were begun, by source file. All others are of no use to it.

    Those of the `remaining` shards; with stored columns of all, since choosing them may read a shard once more.
    """
    if at_once.elsewhere:
        return {}
    names = remaining if survey.stored_counts is None else [contents.file_name for contents in survey.shards]
    return {name: source.downloads(name) for name in names}


def other_files_bytes(source: Source, survey: Survey) -> int:
    """The size of all files without weights: exact for copied files, estimated for records, report and index."""
    copied = sum(source.size_bytes(name) for name in survey.weights.copied)
    files = (*survey.outputs.values(), *survey.sidecars.values())
    columns = sum((survey.stored_counts or {}).values())
    return copied + _RECORD_BYTES_A_TENSOR * sum(len(file.tensors) for file in files) + _RECORD_BYTES_A_COLUMN * columns


@dataclass(frozen=True, slots=True)
class _Shard:
    """The bytes of one shard on the disk. Of its download of `source_bytes`, files of `begun_bytes` are there."""

    output_bytes: int
    source_bytes: int
    begun_bytes: int


def _most_in_turn(shards: Sequence[_Shard], at_once: AtOnce, model_bytes: int) -> int:
    """The most bytes on the disk beside what is there now, while these shards are converted in their order.

    A download that is there goes with its shard: until then it is not free. The run of the model takes `model_bytes`
    besides what is there.
    """
    most = begun = before = 0
    outputs, downloads = _Largest(at_once.outputs), _Largest(1 if at_once.downloads is None else at_once.downloads)
    for shard in shards:
        begun += shard.begun_bytes
        outputs.add(shard.output_bytes)
        downloads.add(shard.source_bytes + (before if at_once.downloads is None else 0))
        before = shard.source_bytes
        most = max(most, outputs.sum + downloads.sum - begun)
    if at_once.elsewhere:
        return most + model_bytes
    return max(most, outputs.sum + model_bytes) if model_bytes else most


def _outputs_bytes(shards: Sequence[_Shard], at_once: AtOnce) -> int:
    outputs = _Largest(at_once.outputs)
    for shard in shards:
        outputs.add(shard.output_bytes)
    return outputs.sum


class _Largest:
    """The sum of the largest numbers that were added: of so many, or of all for None."""

    def __init__(self, count: int | None) -> None:
        self._count = count
        self._heap: list[int] = []
        self.sum = 0

    def add(self, number: int) -> None:
        self.sum += number
        if self._count is not None:
            heappush(self._heap, number)
            if len(self._heap) > self._count:
                self.sum -= heappop(self._heap)


def _pair_bytes(sizes: Sequence[int]) -> int:
    """The most that two in a row have."""
    return max((sum(pair) for pair in pairwise([*sizes, 0])), default=0)


def _free_bytes(directory: Path, disk: int, left_over: Sequence[Path], stays: Collection[Path]) -> int:
    """What is free on a disk, and what files in these directories take of it, but for those that stay."""
    found = (Path(path, name) for each in left_over for path, _, names in os.walk(each) for name in names)
    return free_bytes(directory) + bytes_on_disk((path for path in found if path not in stays), disk)


def _by_disk(
    needed: Iterable[tuple[Path, int]], left_over: Sequence[Path], stays: Collection[Path]
) -> tuple[Room, ...]:
    """What each disk needs, of what is needed below each of these directories."""
    by_disk: dict[int, list[tuple[Path, int]]] = {}
    for directory, size_bytes in needed:
        existing = existing_parent(directory)
        with disk_errors(existing):
            disk = existing.stat().st_dev
        by_disk.setdefault(disk, []).append((existing, size_bytes))
    rooms = []
    for disk, shares in by_disk.items():
        directory, total_bytes = shares[0][0], sum(size_bytes for _, size_bytes in shares)
        rooms.append(Room(directory, total_bytes, _free_bytes(directory, disk, left_over, stays)))
    return tuple(rooms)


def _sidecar_bytes(survey: Survey, name: str) -> int:
    return survey.sidecars[name].file_bytes if name in survey.sidecars else 0
