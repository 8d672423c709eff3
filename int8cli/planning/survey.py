"""All that is known of a conversion before the first weight byte is read: headers, plan, sizes, room needed.

Owns what `convert` starts from and what `--dry-run` shows. Reads config.json, the index and the headers; no torch
for safetensors sources.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import xxhash

from int8cli.checkpoint.config_file import CONFIG_FILE, read_config
from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.index import WeightFiles, find_weights, read_headers
from int8cli.checkpoint.source import Source, SourceIdentity
from int8cli.checkpoint.tensor import ShardContents
from int8cli.checkpoint.writer import existing_parent, free_bytes
from int8cli.planning.layouts import Layout, bitsandbytes
from int8cli.planning.output_files import OutputShard, output_file_names, plan_output_shard, plan_sidecar
from int8cli.planning.plan import Decision, Plan, PlanOptions, make_plan
from int8cli.planning.planned_shard import PlannedShard
from int8cli.planning.quantized import declared_methods, refuse_own_output, refuse_quantized
from int8cli.results.conversion import TensorGroup

_EDGE_BYTES = 1 << 16
# Measured on SmolLM2: what is written beside the weights comes to 684 bytes for each of their tensors.
_RECORD_BYTES_A_TENSOR = 1000
# And 289 bytes for each stored column, in record and report, where it comes with reasons.
_RECORD_BYTES_A_COLUMN = 500


@dataclass(frozen=True)
class Survey:
    """A source as it stands and what it will become. `config` is empty where the source has no config.json.

    `target` is the layout of the output; the plan holds what its loaders accept. `stored_counts` says how many columns
    of each quantized tensor its sidecar holds at most; None where there are no sidecars.
    """

    identity: SourceIdentity
    has_config: bool
    config: Mapping[str, Any]
    weights: WeightFiles
    shards: tuple[ShardContents, ...]
    plan: Plan
    target: Layout = bitsandbytes
    stored_counts: Mapping[str, int] | None = None

    @cached_property
    def decisions(self) -> dict[str, Decision]:
        return decisions_by_name(self.plan)

    @cached_property
    def outputs(self) -> dict[str, OutputShard]:
        """The output shard for each source shard's file name."""
        names = output_file_names([contents.file_name for contents in self.shards], self.weights.copied)
        return {
            contents.file_name: plan_output_shard(contents, self.decisions, names[contents.file_name], self.target)
            for contents in self.shards
        }

    @cached_property
    def sidecars(self) -> dict[str, OutputShard]:
        """The sidecar for each source shard's file name that will have one."""
        if self.stored_counts is None:
            return {}
        planned = {
            contents.file_name: plan_sidecar(
                contents, self.decisions, self.outputs[contents.file_name].file_name, self.stored_counts
            )
            for contents in self.shards
        }
        return {name: sidecar for name, sidecar in planned.items() if sidecar is not None}

    def planned(self, file_name: str) -> PlannedShard:
        """What becomes of one source shard. Its sidecar has room for the most columns that there may be."""
        contents = next(each for each in self.shards if each.file_name == file_name)
        decisions = tuple(self.decisions[stored.spec.name] for stored in contents.tensors)
        plan = replace(self.plan, decisions=decisions)
        return PlannedShard(contents, plan, self.target.NAME, self.outputs[file_name], self.sidecars.get(file_name))

    @property
    def plan_digest(self) -> str:
        """A digest, in hex, of every header that will be written: of what becomes of each tensor."""
        digest = xxhash.xxh3_128()
        for output in self.outputs.values():
            digest.update(output.header)
        return digest.hexdigest()

    @property
    def source_bytes(self) -> int:
        return sum(contents.file_bytes for contents in self.shards)

    @property
    def output_bytes(self) -> int:
        """Size of all output shards, headers included, to the byte."""
        return sum(output.file_bytes for output in self.outputs.values())

    @property
    def sidecar_bytes(self) -> int:
        """Size of all sidecars, to the byte; less only where a linear turns out to have no columns to store."""
        return sum(sidecar.file_bytes for sidecar in self.sidecars.values())

    @property
    def passed_over(self) -> tuple[tuple[str, str], ...]:
        """Everything of the source that is neither converted nor copied, with the reason."""
        stale = (
            f"{CONFIG_FILE}: quantization_config",
            "of another quantization method; these weights are not quantized",
        )
        return self.weights.passed_over + ((stale,) if any(declared_methods(self.config)) else ())


def _told_reason(decision: Decision) -> str:
    """The reason, and the cast where a tensor is not written in the dtype it came in."""
    if decision.written_dtype == decision.spec.dtype:
        return decision.reason
    return f"{decision.reason}; {decision.spec.dtype} cast to {decision.written_dtype}, as loaders would"


@dataclass(frozen=True, slots=True)
class Room:
    """What a disk, named by a directory on it, must have free, and what it has."""

    directory: Path
    needed_bytes: int
    free_bytes: int


def survey_source(source: Source, options: PlanOptions, target: Layout = bitsandbytes) -> Survey:
    """Read what decides a conversion. Raises the errors of a bad checkpoint; nothing is written anywhere.

    What the loaders of `target` accept goes into the plan's options.
    """
    files = source.list_files()
    refuse_own_output(source.identity.name, files)
    weights = find_weights(source)
    has_config = CONFIG_FILE in files
    config = read_config(source) if has_config else {}
    shards = read_headers(source, weights)
    refuse_quantized(config, shards)
    specs = [stored.spec for contents in shards for stored in contents.tensors]
    plan = make_plan(specs, config, replace(options, loader=target.ACCEPTS))
    return Survey(source.identity, has_config, config, weights, shards, plan, target)


def decisions_by_name(plan: Plan) -> dict[str, Decision]:
    return {decision.spec.name: decision for decision in plan.decisions}


def group_by_kind(decisions: Iterable[Decision]) -> tuple[TensorGroup, ...]:
    """Tensors by kind and reason, the largest groups first."""
    groups: dict[tuple[str, str], list[Decision]] = {}
    for decision in decisions:
        groups.setdefault((decision.kind, _told_reason(decision)), []).append(decision)
    grouped = [
        TensorGroup(
            kind,
            reason,
            len(members),
            sum(member.spec.numel for member in members),
            sum(member.spec.nbytes for member in members),
        )
        for (kind, reason), members in groups.items()
    ]
    return tuple(sorted(grouped, key=lambda group: (-group.bytes, group.kind, group.reason)))


def room_needed(
    source: Source, survey: Survey, remaining: Sequence[str], output: Path, peak_shard_bytes: int | None = None
) -> tuple[Room, ...]:
    """The free space that each disk needs to write these shards; one entry per disk.

    That is their output and, for a Hub source, the downloaded shards that exist at once: `peak_shard_bytes`, or else
    the one being converted and the next, or all if the source keeps them. Shards already in the cache need nothing.
    """
    sizes = {contents.file_name: contents.file_bytes for contents in survey.shards}
    transferred = [sizes[name] if source.transfers(name) else 0 for name in remaining]
    wanted = [
        (output, sum(survey.outputs[name].file_bytes for name in remaining)),
        (output, sum(survey.sidecars[name].file_bytes for name in remaining if name in survey.sidecars)),
        (output, beside_bytes(source, survey)),
    ]
    if source.keeps_in is not None:
        wanted.append((source.keeps_in, sum(transferred)))
    else:
        two = max((sum(pair) for pair in pairwise([*transferred, 0])), default=0)
        wanted.append((output, two if peak_shard_bytes is None else max(two, peak_shard_bytes)))
    by_disk: dict[int, list[tuple[Path, int]]] = {}
    for directory, size_bytes in wanted:
        existing = existing_parent(directory)
        with disk_errors(existing):
            disk = existing.stat().st_dev
        by_disk.setdefault(disk, []).append((existing, size_bytes))
    return tuple(
        Room(shares[0][0], sum(size_bytes for _, size_bytes in shares), free_bytes(shares[0][0]))
        for shares in by_disk.values()
    )


def beside_bytes(source: Source, survey: Survey) -> int:
    """Room for what is not weights: copied files as they are, records, report and index by the number of tensors."""
    copied = sum(source.size_bytes(name) for name in survey.weights.copied)
    files = (*survey.outputs.values(), *survey.sidecars.values())
    columns = sum((survey.stored_counts or {}).values())
    return copied + _RECORD_BYTES_A_TENSOR * sum(len(file.tensors) for file in files) + _RECORD_BYTES_A_COLUMN * columns


def fingerprint(source: Source, file_name: str) -> str:
    """A mark of a local shard's state that notices retrained or replaced weights without reading them all.

    xxh3_128 over its first and last 64 KiB: the header, and with a `.bin` the zip directory with every record's CRC.
    A Hub file needs none, its revision says it.
    """
    if source.identity.on_hub:
        return ""
    size_bytes = source.size_bytes(file_name)
    with source.open(file_name) as file:
        edges = file.read(_EDGE_BYTES)
        file.seek(max(len(edges), size_bytes - _EDGE_BYTES))
        edges += file.read(_EDGE_BYTES)
    return xxhash.xxh3_128_hexdigest(edges)


def model_fingerprint(source: Source, shards: Sequence[ShardContents]) -> str:
    """A mark of a local checkpoint's state; empty for the Hub's, whose revision says it."""
    marks = [fingerprint(source, contents.file_name) for contents in shards]
    return hashlib.sha256("\n".join(marks).encode()).hexdigest() if any(marks) else ""
