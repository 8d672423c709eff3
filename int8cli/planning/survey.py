"""Everything that is known about a conversion before the first weight is read: headers, plan, sizes.

Owns what `convert` starts from and what `--dry-run` shows. Reads config.json, the index and the headers. Needs no torch
for safetensors sources.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import xxhash

from int8cli.checkpoint.config_file import CONFIG_FILE, read_config
from int8cli.checkpoint.source import Source, SourceIdentity
from int8cli.checkpoint.tensor import ShardContents
from int8cli.checkpoint.weight_files import WeightFiles, find_weights, read_headers
from int8cli.llm_int8.limits import Steps
from int8cli.planning.blocks import (
    BUFFER_BYTES_A_THREAD,
    CROSSWISE_BYTES_A_THREAD,
    SCALED_BYTES_A_THREAD,
    SMOOTHING_BYTES_A_THREAD,
    TILE_BYTES,
    TILES_AT_ONCE,
)
from int8cli.planning.decisions import Decision, Plan, PlanOptions
from int8cli.planning.experts import split_experts
from int8cli.planning.exponents import most_specs
from int8cli.planning.layouts import Layout, bitsandbytes
from int8cli.planning.leftovers import refuse_leftovers_of_training
from int8cli.planning.output_files import OutputShard, output_file_names, plan_output_shard, plan_sidecar
from int8cli.planning.plan import make_plan
from int8cli.planning.planned_shard import PlannedShard
from int8cli.planning.quantized import declared_methods, refuse_own_output, refuse_quantized
from int8cli.planning.scaled_sources import methods_of, understood_methods, with_scaled_as_floats
from int8cli.results.conversion import TensorGroup

_EDGE_BYTES = 1 << 16


@dataclass(frozen=True)
class Survey:
    """A source and the plan of its conversion. `config` is empty if the source has no config.json.

    `target` is the layout of the output. `shards` have the matrices of fused experts, where the layout stores those in
    int8, in place of the tensors of the file. `stored_counts` is the most columns that a sidecar stores, by quantized
    tensor; None without sidecars. `smooth`: sidecars have the exponents of a smoothing too, of which so many are
    a factor of 2.
    """

    identity: SourceIdentity
    has_config: bool
    config: Mapping[str, Any]
    weights: WeightFiles
    shards: tuple[ShardContents, ...]
    plan: Plan
    target: Layout = bitsandbytes
    stored_counts: Mapping[str, int] | None = None
    smooth: Steps | None = None

    @cached_property
    def decisions(self) -> dict[str, Decision]:
        return decisions_by_name(self.plan)

    @cached_property
    def outputs(self) -> dict[str, OutputShard]:
        """Source shard's file name → output shard."""
        names = output_file_names([contents.file_name for contents in self.shards], self.weights.copied)
        return {
            contents.file_name: plan_output_shard(contents, self.decisions, names[contents.file_name], self.target)
            for contents in self.shards
        }

    @cached_property
    def sidecars(self) -> dict[str, OutputShard]:
        """Source shard's file name → sidecar, for the shards that have one."""
        if self.stored_counts is None:
            return {}
        planned = {
            contents.file_name: plan_sidecar(
                contents,
                self.decisions,
                self.outputs[contents.file_name].file_name,
                self.stored_counts,
                tuple(most_specs(contents, self.decisions, self.smooth)) if self.smooth else (),
            )
            for contents in self.shards
        }
        return {name: sidecar for name, sidecar in planned.items() if sidecar is not None}

    def planned(self, file_name: str) -> PlannedShard:
        """The plan of one source shard. Its sidecar has the largest possible number of columns."""
        contents = next(each for each in self.shards if each.file_name == file_name)
        decisions = tuple(self.decisions[stored.spec.name] for stored in contents.tensors)
        plan = replace(self.plan, decisions=decisions)
        return PlannedShard(contents, plan, self.target.KEY, self.outputs[file_name], self.sidecars.get(file_name))

    def only(self, names: Collection[str]) -> "Survey":
        """The same survey of some of its shards, for what is reported about these."""
        shards = tuple(contents for contents in self.shards if contents.file_name in names)
        decisions = tuple(self.decisions[stored.spec.name] for contents in shards for stored in contents.tensors)
        return replace(self, shards=shards, plan=replace(self.plan, decisions=decisions))

    def in_layout(self, target: Layout) -> "Survey":
        """The same source planned for another layout, without stored columns."""
        return _planned_survey(
            self.identity, self.config, self.weights, self.source_shards, self.plan.options, target, self.has_config
        )

    @property
    def source_shards(self) -> tuple[ShardContents, ...]:
        """The shards with fused experts as one tensor again."""
        return tuple(contents.unsplit() for contents in self.shards)

    @property
    def plan_digest(self) -> str:
        """A digest, in hex, of all output headers. It changes if any tensor's decision changes."""
        digest = xxhash.xxh3_128()
        for output in self.outputs.values():
            digest.update(output.header)
        return digest.hexdigest()

    def buffer_bytes(self, threads: int, processes: int = 1) -> int:
        """The buffers that convert this source with so many threads in all, besides what is read of whole files."""
        scaled = any(stored.scaled is not None for contents in self.shards for stored in contents.tensors)
        crosswise = any(
            stored.column_major != (decision.quantize and decision.transpose)
            for contents in self.shards
            for stored in contents.tensors
            if (decision := self.decisions[stored.spec.name])
        )
        a_thread = BUFFER_BYTES_A_THREAD
        a_thread += SMOOTHING_BYTES_A_THREAD[self.smooth] if self.smooth else 0
        a_thread += SCALED_BYTES_A_THREAD if scaled else 0
        a_thread += CROSSWISE_BYTES_A_THREAD if crosswise else 0
        return threads * a_thread + (processes * TILES_AT_ONCE * TILE_BYTES if crosswise else 0)

    @property
    def source_bytes(self) -> int:
        return sum(contents.file_bytes for contents in self.shards)

    @property
    def output_bytes(self) -> int:
        """The size of all output shards with their headers, to the byte."""
        return sum(output.file_bytes for output in self.outputs.values())

    @property
    def sidecar_bytes(self) -> int:
        """The size of all sidecars, to the byte. It is smaller if a linear has fewer columns to store, or no fold."""
        return sum(sidecar.file_bytes for sidecar in self.sidecars.values())

    @property
    def passed_over(self) -> tuple[tuple[str, str], ...]:
        """Everything in the source that is neither converted nor copied, with the reason."""
        found = self.weights.passed_over
        unread = [stored for contents in self.shards for stored in contents.unread]
        if unread:
            found += ((f"{len(unread):,} tensors of scales", "8-bit floats are written as what they stand for"),)
        if any(declared_methods(self.config)):
            why = "these weights are not quantized" if not unread else "that of the 8-bit floats"
            found += ((f"{CONFIG_FILE}: quantization_config", f"of another quantization method; {why}"),)
        return found

    @property
    def scaled_tensors(self) -> int:
        """How many tensors are 8-bit floats with scales in the source, and here the floats that they stand for."""
        codes = {stored.in_file for contents in self.shards for stored in contents.tensors if stored.scaled is not None}
        return len(codes)


def _reason_with_cast(decision: Decision) -> str:
    """The reason, and the cast if a tensor is written in another dtype."""
    if decision.quantize or decision.written_dtype == decision.spec.dtype:
        return decision.reason
    return f"{decision.reason}; {decision.spec.dtype} cast to {decision.written_dtype}, as loaders would"


def survey_source(source: Source, options: PlanOptions, target: Layout = bitsandbytes) -> Survey:
    """Read everything that determines a conversion, and make the plan for the loaders of `target`. Writes nothing.

    Raises the errors of an invalid checkpoint.
    """
    files = source.list_files()
    refuse_own_output(source.identity.name, files)
    weights = find_weights(source)
    has_config = CONFIG_FILE in files
    config = read_config(source) if has_config else {}
    shards = read_headers(source, weights)
    methods = methods_of(config, files)
    shards = with_scaled_as_floats(shards, config, methods)
    refuse_quantized(shards, methods, understood_methods(shards))
    refuse_leftovers_of_training(shards)
    return _planned_survey(source.identity, config, weights, shards, options, target, has_config)


def _planned_survey(
    identity: SourceIdentity,
    config: Mapping[str, Any],
    weights: WeightFiles,
    shards: tuple[ShardContents, ...],
    options: PlanOptions,
    target: Layout,
    has_config: bool,
) -> Survey:
    """`shards` have the tensors of the files."""
    options = replace(options, loader=target.ACCEPTS)
    shards = split_experts(shards, config, options)
    specs = [stored.spec for contents in shards for stored in contents.tensors]
    return Survey(identity, has_config, config, weights, shards, make_plan(specs, config, options), target)


def decisions_by_name(plan: Plan) -> dict[str, Decision]:
    return {decision.spec.name: decision for decision in plan.decisions}


def group_by_kind(decisions: Iterable[Decision]) -> tuple[TensorGroup, ...]:
    """Tensors by kind and reason, the largest groups first."""
    groups: dict[tuple[str, str], list[Decision]] = {}
    for decision in decisions:
        groups.setdefault((decision.kind, _reason_with_cast(decision)), []).append(decision)
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


def fingerprint(source: Source, file_name: str) -> str:
    """A digest that detects retrained or replaced weights of a local shard without reading all of it.

    xxh3_128 of its first and last 64 KiB: the header, or for a `.bin` the zip directory with every record's CRC. Empty
    for a Hub file, which its revision identifies.
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
    """A digest of a local checkpoint's fingerprints; empty for a Hub repository, which its revision identifies."""
    marks = [fingerprint(source, contents.file_name) for contents in shards]
    return hashlib.sha256("\n".join(marks).encode()).hexdigest() if any(marks) else ""
