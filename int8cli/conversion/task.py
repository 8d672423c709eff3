"""The data that a process needs to convert one shard.

Needs no torch, so that a process that only sends tasks to others need not import it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from int8cli.checkpoint.file_kinds import WeightFormat
from int8cli.checkpoint.own_files import name_aside
from int8cli.planning.exponents import NOT_SMOOTHED, ShardSmoothing
from int8cli.planning.output_files import OutputShard
from int8cli.planning.planned_shard import PlannedShard
from int8cli.records.conversion import ShardSource
from int8cli.results.smoothing import LayerSmoothing
from int8cli.results.stored_columns import StoredColumns


@dataclass(frozen=True, slots=True)
class PassOptions:
    """How to make a pass over a shard. Only `float32_via_half` changes the bytes it writes.

    `keep_non_finite`: report weights with NaN or infinity in the result instead of raising. `figures`: measure the
    error of quantized weights.
    """

    threads: int = 1
    device: str = "cpu"
    float32_via_half: bool = False
    keep_non_finite: bool = False
    figures: bool = True


@dataclass(frozen=True, slots=True)
class ShardTask:
    """Everything that a process needs to convert one shard on this machine. Picklable.

    Files are written at `partial` first and then moved to `directory`. `stored` has the reasons for the stored columns
    of each tensor, `smoothing` what to report on the smoothing of each weight.
    """

    source: ShardSource
    weight_format: WeightFormat
    planned: PlannedShard
    directory: Path
    partial: Path
    options: PassOptions
    stored: Mapping[str, StoredColumns] = field(default_factory=dict)
    smoothing: Mapping[str, LayerSmoothing] = field(default_factory=dict)

    @property
    def tensor_bytes(self) -> int:
        return self.planned.tensor_bytes

    def partial_of(self, file: OutputShard) -> Path:
        """Where one of the planned files is written before it is complete."""
        is_shard = file.file_name == self.planned.output.file_name
        return self.partial if is_shard else self.partial.with_name(name_aside(self.partial.name, suffix=".outliers"))

    def storing(self, stored: Mapping[str, StoredColumns], smoothing: ShardSmoothing = NOT_SMOOTHED) -> "ShardTask":
        """The same task with these columns in the sidecar, if a sidecar is planned, and smoothed."""
        columns = {name: each.indices for name, each in stored.items()}
        planned = self.planned.with_columns(columns, smoothing.exponents)
        return replace(self, planned=planned, stored=stored, smoothing=smoothing.layers)
