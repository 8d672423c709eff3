"""What one source shard becomes: the decision on each of its tensors, and the files that they are written to.

Owns how decisions and files fit together, and how the files change with the stored columns and with weights that
cannot be quantized. Picklable and without torch, so that a process which plans a shard need not be able to convert it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from int8cli.checkpoint.tensor import ShardContents
from int8cli.planning.decisions import Decision, Plan
from int8cli.planning.exponents import NOTHING_SCALED, TensorExponents, exponent_specs
from int8cli.planning.layouts import LAYOUTS_BY_KEY, Layout
from int8cli.planning.output_files import OutputShard, plan_output_shard, plan_sidecar


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One source shard and its outputs, planned to the byte.

    `plan` has the decisions on this shard's tensors, in file order. `layout` is the key of that of `output`. `sidecar`
    is the file for the input columns `columns`, sorted, by tensor, and for the `exponents` of the tensors that a
    smoothing changes; None if the shard gets no sidecar.
    """

    contents: ShardContents
    plan: Plan
    layout: str
    output: OutputShard
    sidecar: OutputShard | None = None
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    exponents: Mapping[str, TensorExponents] = field(default_factory=dict)

    @property
    def target(self) -> Layout:
        return LAYOUTS_BY_KEY[self.layout]

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

    def with_columns(
        self, columns: Mapping[str, tuple[int, ...]], exponents: Mapping[str, TensorExponents] = NOTHING_SCALED
    ) -> "PlannedShard":
        """The same shard smoothed, with these columns in its sidecar; unchanged if it has no sidecar."""
        if self.sidecar is None:
            return self
        return plan_shard(self.contents, self.plan, self.output.file_name, self.target, columns, exponents)

    def with_copied(self, tensor_names: Collection[str]) -> "PlannedShard":
        """The same shard with these tensors, which hold NaN or infinity, written as floats. It may lose its sidecar."""
        columns = self.columns if self.sidecar is not None else None
        plan = self.plan.with_copied(tensor_names)
        return plan_shard(self.contents, plan, self.output.file_name, self.target, columns, self.exponents)


def plan_shard(
    contents: ShardContents,
    plan: Plan,
    file_name: str,
    target: Layout,
    columns: Mapping[str, tuple[int, ...]] | None = None,
    exponents: Mapping[str, TensorExponents] = NOTHING_SCALED,
) -> PlannedShard:
    """Plan the files of a shard that becomes `file_name`.

    `columns` are the input columns to store exactly, by tensor; None for no sidecar. Columns of a tensor that is not
    quantized are ignored. `exponents` are those of the shard's tensors that a smoothing changes. A shard without
    quantized or changed tensors has no sidecar.
    """
    decisions = {decision.spec.name: decision for decision in plan.decisions}
    output = plan_output_shard(contents, decisions, file_name, target)
    if columns is None:
        return PlannedShard(contents, plan, target.KEY, output)
    stored = {name: indices for name, indices in columns.items() if decisions[name].quantize}
    counts = {name: len(indices) for name, indices in stored.items()}
    smoothed = tuple(spec for name, each in exponents.items() for spec, _ in exponent_specs(name, each))
    sidecar = plan_sidecar(contents, decisions, file_name, counts, smoothed)
    return PlannedShard(contents, plan, target.KEY, output, sidecar, stored, exponents)
