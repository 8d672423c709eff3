"""What one source shard becomes: the decision on each of its tensors, and the files that they are written to.

Owns how decisions and files fit together, and how the files change with the stored columns and with weights that
cannot be quantized. Picklable and without torch, so that a process which plans a shard need not be able to convert it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from int8cli.checkpoint.tensor import ShardContents
from int8cli.planning.decisions import Decision, Plan
from int8cli.planning.layouts import LAYOUTS, Layout
from int8cli.planning.output_files import OutputShard, plan_output_shard, plan_sidecar


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One source shard and its outputs, planned to the byte.

    `plan` has the decisions on this shard's tensors, in file order. `layout` names the format of `output`. `sidecar`
    is the file for the input columns `columns`, sorted, by tensor; None if the shard gets no sidecar.
    """

    contents: ShardContents
    plan: Plan
    layout: str
    output: OutputShard
    sidecar: OutputShard | None = None
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def target(self) -> Layout:
        return LAYOUTS[self.layout]

    @property
    def decisions(self) -> dict[str, Decision]:
        """The decisions by tensor name. Each call builds a new dict."""
        return {decision.spec.name: decision for decision in self.plan.decisions}

    @property
    def files(self) -> tuple[OutputShard, ...]:
        """The files to write, the shard itself first."""
        return (self.output,) if self.sidecar is None else (self.output, self.sidecar)

    @property
    def tensor_bytes(self) -> int:
        """The size of the source's tensors, as the file has them."""
        return sum(stored.file_nbytes for stored in self.contents.tensors)

    def with_columns(self, columns: Mapping[str, tuple[int, ...]]) -> "PlannedShard":
        """The same shard with these columns in its sidecar; unchanged if it has no sidecar."""
        if self.sidecar is None:
            return self
        return plan_shard(self.contents, self.plan, self.output.file_name, self.target, columns)

    def with_copied(self, tensor_names: Collection[str]) -> "PlannedShard":
        """The same shard with these tensors, which hold NaN or infinity, copied unchanged. It may lose its sidecar."""
        columns = self.columns if self.sidecar is not None else None
        plan = self.plan.with_copied(tensor_names)
        return plan_shard(self.contents, plan, self.output.file_name, self.target, columns)


def plan_shard(
    contents: ShardContents,
    plan: Plan,
    file_name: str,
    target: Layout,
    columns: Mapping[str, tuple[int, ...]] | None = None,
) -> PlannedShard:
    """Plan the files of a shard that becomes `file_name`.

    `columns` are the input columns to store exactly, by tensor; None for no sidecar. Columns of a tensor that is not
    quantized are ignored. A shard without quantized tensors has no sidecar.
    """
    decisions = {decision.spec.name: decision for decision in plan.decisions}
    output = plan_output_shard(contents, decisions, file_name, target)
    if columns is None:
        return PlannedShard(contents, plan, target.NAME, output)
    stored = {name: indices for name, indices in columns.items() if decisions[name].quantize}
    counts = {name: len(indices) for name, indices in stored.items()}
    sidecar = plan_sidecar(contents, decisions, file_name, counts)
    return PlannedShard(contents, plan, target.NAME, output, sidecar, stored)
