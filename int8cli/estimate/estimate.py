"""The memory and disk space that a model needs, before its weights are downloaded.

Owns the estimate: it adds up the weights (`weights`), the KV cache (`kv_cache`), workspaces, and what a conversion
needs. Does not know about cards. Needs no torch. All sizes are in bytes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from int8cli.checkpoint.source import Source
from int8cli.estimate.asking import ConfigClass
from int8cli.estimate.cards import Load
from int8cli.estimate.class_cache import kv_cache_of
from int8cli.estimate.key_value_rows import key_value_rows
from int8cli.estimate.kv_cache import DTYPE_BYTES, KvCache
from int8cli.estimate.units import PARTS, MemoryUnit, cached_units, part_of, units_of
from int8cli.estimate.weights import Weights, buffers_of, bytes_in_file, names_not_in_memory, weights_of
from int8cli.planning.mixtures import LayoutShare, layout_shares
from int8cli.planning.room import ONE_PROCESS, other_files_bytes, room_needed
from int8cli.planning.survey import Survey

FLOAT16 = "float16"
INT8 = "int8"
PRECISIONS = (FLOAT16, INT8)
OUTLIER_SHARE = 0.001  # LLM.int8(): about 0.1 % of the features
WORKSPACE_FORMULA = "T·(in + 6·out + 4) + 2·k·(T + out) bytes: T tokens at once, k = 0.1 % of in"


@dataclass(frozen=True, slots=True)
class Use:
    """How the model will be used: `batch` sequences of `context` tokens, all in one forward pass."""

    context: int
    batch: int = 1
    kv_dtype: str = "float16"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model, by its name in `units`, and its weights."""

    name: str
    weights: Weights


@dataclass(frozen=True, slots=True)
class ConversionNeeds:
    """What `convert` needs, in bytes.

    `buffer_bytes` is memory, in addition to Python with torch imported. `disk_bytes` is the peak: the output, and the
    shards that are on this machine at once. `disk_keeping_source_bytes` is the peak if all source shards are kept.
    """

    download_bytes: int
    output_bytes: int
    buffer_bytes: int
    disk_bytes: int
    disk_keeping_source_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Everything known about a model's needs. Weights with two names are counted once."""

    survey: Survey
    units: tuple[tuple[MemoryUnit, Weights], ...]
    parts: tuple[Part, ...]
    cache: KvCache
    conversion: ConversionNeeds
    not_in_memory: frozenset[str]

    @cached_property
    def layouts(self) -> tuple[LayoutShare, ...]:
        """What each layout does with a mixture of experts, that of the survey first; empty for other models."""
        return layout_shares(self.survey)

    @property
    def weights(self) -> Weights:
        """The total over all units, without the buffers that a loader adds."""
        return Weights.total(weights for _, weights in self.units)

    @property
    def buffer_bytes(self) -> int:
        buffers = buffers_of(self.survey.config)
        return buffers.model_bytes + buffers.block_bytes * sum(unit.is_block for unit, _ in self.units)

    @property
    def largest_block(self) -> tuple[MemoryUnit, Weights] | None:
        """The largest block in 16 bit; None for a model without blocks."""
        blocks = [(unit, weights) for unit, weights in self.units if unit.is_block]
        return max(blocks, key=lambda block: block[1].float16_bytes, default=None)

    @property
    def stored_dtypes(self) -> dict[str, int]:
        """Bytes of the source by dtype as the files have it, largest first."""
        sizes: dict[str, int] = {}
        for contents in self.survey.shards:
            for stored in contents.as_in_file().tensors:
                sizes[stored.spec.dtype] = sizes.get(stored.spec.dtype, 0) + stored.spec.nbytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def kv_bytes(self, use: Use) -> int | None:
        """The size of the whole cache; None if the config is not understood."""
        layers = self.cache.layer_bytes(use.context, use.batch, DTYPE_BYTES[use.kv_dtype])
        return None if layers is None else sum(layers)

    def workspace_bytes(self, use: Use, precision: str) -> int:
        """The largest workspace of any unit, with all tokens in one pass."""
        return max((unit_workspace(unit, precision, use.batch * use.context) for unit, _ in self.units), default=0)

    def loads(self, precision: str, use: Use | None) -> tuple[Load, ...]:
        """What each unit needs on its card. Without a `use`, its weights and the workspace for one token.

        An unknown cache counts as zero here. A caller that shows the result must say so.
        """
        kv: dict[str, int] = {}
        layers = use and self.cache.layer_bytes(use.context, use.batch, DTYPE_BYTES[use.kv_dtype])
        for name, layer in cached_units((unit for unit, _ in self.units), len(layers or ())):
            kv[name] = kv.get(name, 0) + (layers or ())[layer]
        tokens = use.batch * use.context if use else 1
        buffers = buffers_of(self.survey.config)
        return tuple(
            Load(
                unit.name,
                (weights.int8_bytes if precision == INT8 else weights.float16_bytes)
                + (buffers.block_bytes if unit.is_block else 0)
                + (buffers.model_bytes if place == 0 else 0),
                kv.get(unit.name, 0),
                unit_workspace(unit, precision, tokens),
            )
            for place, (unit, weights) in enumerate(self.units)
        )


def estimate_memory(source: Source, survey: Survey, output: Path, *, threads: int) -> Estimate:
    """Estimate the needs of a surveyed model. `output` is the directory that a conversion would write."""
    decisions = survey.plan.decisions
    config_class = ConfigClass(survey.config)
    not_in_memory = names_not_in_memory(decisions, survey.config, config_class)
    not_in_memory |= _aliases(survey, not_in_memory)
    in_files = {stored.spec.name: bytes_in_file(stored) for shard in survey.shards for stored in shard.tensors}
    units, parts = [], dict[str, Weights]()
    found = units_of(decisions)
    for unit in found:
        weights = Weights()
        for decision in unit.decisions:
            name = decision.spec.name
            size = weights_of(decision, in_files[name], in_memory=name not in not_in_memory)
            weights += size
            part = part_of(decision, unit)
            parts[part] = parts.get(part, Weights()) + size
        units.append((unit, weights))
    return Estimate(
        survey,
        tuple(units),
        tuple(Part(name, parts[name]) for name in PARTS if name in parts),
        kv_cache_of(survey.config, key_value_rows(found, survey.config), config_class),
        _conversion(source, survey, output, threads),
        not_in_memory,
    )


def unit_workspace(unit: MemoryUnit, precision: str, tokens: int) -> int:
    """The workspace of a unit's largest matrix product, besides its input and weight, for `tokens` tokens at once."""
    shapes = [
        tuple(reversed(decision.spec.shape)) if decision.transpose else decision.spec.shape
        for decision in unit.decisions
        if decision.quantize
    ]
    product = int8_workspace if precision == INT8 else _float16_workspace
    return max((product(out_features, in_features, tokens) for out_features, in_features in shapes), default=0)


def int8_workspace(out_features: int, in_features: int, tokens: int) -> int:
    """The estimated workspace of one LLM.int8() product in bytes, by WORKSPACE_FORMULA.

    It consists of the int8 inputs and their scales, the int32 product and its 16-bit result, and the outlier columns of
    inputs and weight in 16 bit (bitsandbytes, autograd/_functions.py, `MatMul8bitLt.forward`).
    """
    outliers = math.ceil(OUTLIER_SHARE * in_features)
    return tokens * (in_features + 6 * out_features + 4) + 2 * outliers * (tokens + out_features)


def _float16_workspace(out_features: int, in_features: int, tokens: int) -> int:
    return 2 * tokens * out_features


def _aliases(survey: Survey, not_in_memory: frozenset[str]) -> frozenset[str]:
    """The tensors in memory that share their bytes in a `.bin` with an earlier tensor."""
    found: set[str] = set()
    for contents in survey.shards:
        seen: set[tuple[int, int]] = set()
        for stored in contents.tensors if contents.mappable else ():
            place = (stored.offset_bytes, stored.spec.nbytes)
            if stored.spec.name in not_in_memory or not stored.spec.nbytes:
                continue
            if place in seen:
                found.add(stored.spec.name)
            seen.add(place)
    return frozenset(found)


def _conversion(source: Source, survey: Survey, output: Path, threads: int) -> ConversionNeeds:
    sizes: Mapping[str, int] = {contents.file_name: contents.file_bytes for contents in survey.shards}
    download_bytes = sum(size for name, size in sizes.items() if source.transfers(name))
    rooms = room_needed(source, survey, list(sizes), output, ONE_PROCESS)
    return ConversionNeeds(
        download_bytes,
        survey.output_bytes,
        survey.buffer_bytes(threads),
        sum(room.needed_bytes for room in rooms),
        survey.output_bytes + other_files_bytes(source, survey) + download_bytes,
    )
