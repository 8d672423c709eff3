"""What a process is given to convert one shard.

Owns nothing but the data: made here without torch, so that a process that only hands tasks out does not need it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from int8cli.checkpoint.index import WeightFormat
from int8cli.checkpoint.tensor import ShardContents
from int8cli.planning.plan import Decision, Plan
from int8cli.records.store import ShardSource
from int8cli.results.conversion import NOTHING_STORED, StoredColumns


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

    `plan` holds the decisions on this shard's tensors, in their order in the file; `target` names the output's layout.
    `sidecar`, where there is to be one, says where it goes; `stored` names its columns, by tensor.
    """

    source: ShardSource
    weight_format: WeightFormat
    layout: ShardContents
    plan: Plan
    output: Path
    partial: Path
    options: PassOptions
    target: str
    sidecar: Path | None = None
    stored: Mapping[str, StoredColumns] = field(default_factory=dict)

    @property
    def tensor_bytes(self) -> int:
        return sum(stored.spec.nbytes for stored in self.layout.tensors)

    def stored_in(self, decision: Decision) -> StoredColumns | None:
        """The columns stored of a linear, none of one that nothing was chosen for; None where there is no sidecar."""
        return self.stored.get(decision.spec.name, NOTHING_STORED) if self.sidecar is not None else None
