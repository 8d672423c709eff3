"""What a process is given to convert one shard.

Owns nothing but the data: made here without torch, so that a process that only hands tasks out does not need it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from int8cli.checkpoint.file_kinds import WeightFormat
from int8cli.checkpoint.own_files import name_aside
from int8cli.planning.output_files import OutputShard
from int8cli.planning.planned_shard import PlannedShard
from int8cli.records.conversion import ShardSource
from int8cli.results.stored_columns import StoredColumns


@dataclass(frozen=True, slots=True)
class PassOptions:
    """How a pass over a shard is made; nothing here changes the bytes it writes, but `float32_via_half`.

    `keep_non_finite`: a weight with NaN or an infinity is put down in the result instead of raised. `figures`:
    the error of what is quantized is measured.
    """

    threads: int = 1
    device: str = "cpu"
    float32_via_half: bool = False
    keep_non_finite: bool = False
    figures: bool = True


@dataclass(frozen=True, slots=True)
class ShardTask:
    """All that a process needs to convert one shard that is on this machine. Picklable.

    Its files go into `directory`, and are made at `partial` until then. `stored` says why its columns are stored, by
    tensor.
    """

    source: ShardSource
    weight_format: WeightFormat
    planned: PlannedShard
    directory: Path
    partial: Path
    options: PassOptions
    stored: Mapping[str, StoredColumns] = field(default_factory=dict)

    @property
    def tensor_bytes(self) -> int:
        return self.planned.tensor_bytes

    def partial_of(self, file: OutputShard) -> Path:
        """Where one of the planned files is made."""
        is_shard = file.file_name == self.planned.output.file_name
        return self.partial if is_shard else self.partial.with_name(name_aside(self.partial.name, suffix=".outliers"))

    def storing(self, stored: Mapping[str, StoredColumns]) -> "ShardTask":
        """The same task with these columns in the sidecar, where there is to be one."""
        columns = {name: each.indices for name, each in stored.items()}
        return replace(self, planned=self.planned.with_columns(columns), stored=stored)
