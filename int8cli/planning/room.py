"""The disk space that a conversion needs: its output, and the shards that are on the disk at once.

Owns how many of them are counted. Needs no torch.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from heapq import nlargest
from itertools import pairwise
from pathlib import Path

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.source import Source
from int8cli.checkpoint.writer import existing_parent, free_bytes
from int8cli.planning.survey import Survey

# Measured on SmolLM2: record, report and index need 684 bytes for each tensor.
_RECORD_BYTES_A_TENSOR = 1000
# And 289 bytes for each stored column with its figures.
_RECORD_BYTES_A_COLUMN = 500


@dataclass(frozen=True, slots=True)
class AtOnce:
    """How many shards are on the disk at the same time.

    `outputs`: those of the output; None if all stay. `downloads`: those of the source, which may be any of them; None
    for the one that is converted and the one after it. `model_apart`: a run of the model has shards of its own beside
    these, because it is another process.
    """

    outputs: int | None = None
    downloads: int | None = None
    model_apart: bool = False


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
    Shards in the Hub cache need nothing. A run of the model has `model_bytes` of downloaded shards at once.
    What an interrupted run has left in the directories `left_over` counts as free: it is replaced or gone on with.
    """
    sizes = {contents.file_name: contents.file_bytes for contents in survey.shards}
    transferred = [sizes[name] if source.transfers(name) else 0 for name in remaining]
    outputs = [survey.outputs[name].file_bytes + _sidecar_bytes(survey, name) for name in remaining]
    needed = [
        (output, sum(outputs if at_once.outputs is None else nlargest(at_once.outputs, outputs))),
        (output, other_files_bytes(source, survey)),
    ]
    if source.keeps_in is not None:
        needed.append((source.keeps_in, sum(transferred)))
    else:
        needed.append((output, _downloads_bytes(transferred, at_once, model_bytes)))
    by_disk: dict[int, list[tuple[Path, int]]] = {}
    for directory, size_bytes in needed:
        existing = existing_parent(directory)
        with disk_errors(existing):
            disk = existing.stat().st_dev
        by_disk.setdefault(disk, []).append((existing, size_bytes))
    return tuple(
        Room(shares[0][0], sum(size_bytes for _, size_bytes in shares), _free_bytes(shares[0][0], disk, left_over))
        for disk, shares in by_disk.items()
    )


def other_files_bytes(source: Source, survey: Survey) -> int:
    """The size of all files without weights: exact for copied files, estimated for records, report and index."""
    copied = sum(source.size_bytes(name) for name in survey.weights.copied)
    files = (*survey.outputs.values(), *survey.sidecars.values())
    columns = sum((survey.stored_counts or {}).values())
    return copied + _RECORD_BYTES_A_TENSOR * sum(len(file.tensors) for file in files) + _RECORD_BYTES_A_COLUMN * columns


def _free_bytes(directory: Path, disk: int, left_over: Sequence[Path]) -> int:
    """What is free on a disk, and what files in these directories take of it."""
    taken = 0
    for path, _, names in (entry for each in left_over for entry in os.walk(each)):
        for name in names:
            with suppress(OSError):  # it was removed meanwhile
                found = os.lstat(os.path.join(path, name))
                taken += found.st_blocks * 512 if found.st_dev == disk else 0
    return free_bytes(directory) + taken


def _downloads_bytes(transferred: Sequence[int], at_once: AtOnce, model_bytes: int) -> int:
    """The most bytes of downloaded shards at once. `transferred` are the bytes of each, in the order of their turn."""
    if at_once.downloads is None:
        most = max((sum(pair) for pair in pairwise([*transferred, 0])), default=0)
    else:
        most = sum(nlargest(at_once.downloads, transferred))
    return most + model_bytes if at_once.model_apart else max(most, model_bytes)


def _sidecar_bytes(survey: Survey, name: str) -> int:
    return survey.sidecars[name].file_bytes if name in survey.sidecars else 0
