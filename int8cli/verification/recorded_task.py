"""The task that converts a shard again, exactly as its record says that it was converted.

Owns the use of recorded decisions in place of today's, so that a check also works in a later version of int8cli that
decides differently.
"""

from dataclasses import replace
from pathlib import Path

from int8cli.checkpoint.tensor import ShardContents
from int8cli.conversion.task import PassOptions, ShardTask
from int8cli.planning.decisions import Decision, Plan
from int8cli.planning.exponents import TensorExponents
from int8cli.planning.output_files import sidecar_file_name
from int8cli.planning.plan import make_plan
from int8cli.planning.planned_shard import plan_shard
from int8cli.planning.survey import Survey, decisions_by_name
from int8cli.records.conversion import VIA_FLOAT16, Conversion, ShardSource
from int8cli.records.shard_record import ShardRecord
from int8cli.results.conversion import LayerReport
from int8cli.results.stored_columns import StoredColumns
from int8cli.verification.options import VerificationRun
from int8cli.verification.sidecars import column_problem, recorded_exponents


def task_as_recorded(
    directory: Path,
    shard: ShardSource,
    survey: Survey,
    conversion: Conversion,
    record: ShardRecord,
    options: VerificationRun,
) -> ShardTask:
    """The task that converts the shard as its record says it was converted."""
    contents = _contents_as_recorded(survey, shard, record)
    via_half, figures = conversion.settings.float32 == VIA_FLOAT16, conversion.settings.figures
    stored: dict[str, StoredColumns] | None = None
    exponents: dict[str, TensorExponents] = {}
    if _is_comparable(record, sidecar_file_name(shard.output), contents, conversion):
        stored = {f"{layer.name}.weight": layer.stored for layer in record.layers if layer.stored is not None}
        exponents = recorded_exponents(directory / sidecar_file_name(shard.output), contents)
    columns = {name: each.indices for name, each in stored.items()} if stored is not None else None
    plan = _plan_as_recorded(survey, contents, record)
    return ShardTask(
        source=shard,
        weight_format=survey.weights.format,
        planned=plan_shard(contents, plan, shard.output, survey.target, columns, exponents),
        directory=directory,
        partial=directory / shard.output,
        options=PassOptions(options.threads, options.device, via_half, keep_non_finite=True, figures=figures),
        stored=stored or {},
    )


def _contents_as_recorded(survey: Survey, shard: ShardSource, record: ShardRecord) -> ShardContents:
    """The shard's tensors, with fused experts split if they were split when it was converted."""
    contents = next(each for each in survey.shards if each.file_name == shard.file)
    recorded = {spec.name for spec in record.source_tensors}
    return contents if recorded == {stored.spec.name for stored in contents.tensors} else contents.unsplit()


def _is_comparable(record: ShardRecord, sidecar: str, contents: ShardContents, conversion: Conversion) -> bool:
    """Whether there is a sidecar with a plausible record. If it is implausible, the check of sidecars reports that."""
    known = {stored.spec.name for stored in contents.tensors}
    most = conversion.settings.most_columns
    sound = (f"{layer.name}.weight" in known and column_problem(layer, most) is None for layer in record.layers)
    return sidecar in (file.file for file in record.files[1:]) and all(sound)


def _plan_as_recorded(survey: Survey, contents: ShardContents, record: ShardRecord) -> Plan:
    layers = {f"{layer.name}.weight": layer for layer in record.layers}
    decisions = survey.decisions
    if any(stored.spec.name not in decisions for stored in contents.tensors):
        whole = [stored.spec for each in survey.source_shards for stored in each.tensors]
        decisions = decisions_by_name(make_plan(whole, survey.config, survey.plan.options))
    own = (decisions[stored.spec.name] for stored in contents.tensors)
    dtypes = {tensor.name: tensor.dtype for tensor in record.files[0].tensors}
    as_recorded = (_as_recorded(each, layers.get(each.spec.name), dtypes.get(each.spec.name)) for each in own)
    return replace(survey.plan, decisions=tuple(as_recorded))


def _as_recorded(decision: Decision, layer: LayerReport | None, dtype: str | None) -> Decision:
    """`dtype` is the one in which the tensor was written, by its record."""
    if layer is None:
        # Earlier versions copied a weight with NaN as it is, also where loaders hold it in another dtype.
        as_it_is = decision.quantize and dtype == decision.spec.dtype
        written_dtype = decision.spec.dtype if as_it_is else decision.written_dtype
        return replace(decision, quantize=False, transpose=False, written_dtype=written_dtype)
    transpose = decision.transpose if decision.quantize else layer.shape != decision.spec.shape
    return replace(decision, quantize=True, transpose=transpose)
