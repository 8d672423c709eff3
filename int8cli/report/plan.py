"""The plan of a conversion: tensors by kind, output sizes, and what the conversion needs."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from int8cli.checkpoint.tensor import ShardContents
from int8cli.estimate.ways import Way
from int8cli.planning.needs import ClusterNeeds, Needs
from int8cli.planning.room import Room
from int8cli.planning.share import PlannedShare
from int8cli.planning.survey import Survey, group_by_kind
from int8cli.records.conversion import FINE_SMOOTHING, NO_OUTLIERS, Settings
from int8cli.report.conversion import groups_table
from int8cli.report.stored import chosen_by, columns_word, percent_more
from int8cli.report.terminal import stdout_console
from int8cli.report.text import escape
from int8cli.report.ways import ways_table
from int8cli.results.units import counted, human_bytes, human_count, percent, told_apart
from int8cli.workers.ray_session import TaskNeeds

PLAN_SCHEMA = "int8cli.plan/1"


def plan_to_json(
    survey: Survey,
    needs: Needs,
    settings: Settings | None = None,
    ways: Sequence[Way] = (),
    share: PlannedShare | None = None,
) -> dict[str, Any]:
    """The plan as JSON. `output_bytes` counts the shards; `settings` say how stored columns will be chosen.

    `smooth` says whether what a calibration proves will be smoothed, `figures` whether the error of every layer will be
    measured; null if that is not decided. `part` is what one part of the conversion has to do, to which `needs` belong;
    null for the whole. `cluster` in `needs` is null without one.
    """
    plan = survey.plan
    return {
        "schema": PLAN_SCHEMA,
        "model": survey.identity.name,
        "revision": survey.identity.revision,
        "source_bytes": survey.source_bytes,
        "output_bytes": survey.output_bytes,
        "sidecar_bytes": survey.sidecar_bytes,
        "total_bytes": survey.output_bytes + survey.sidecar_bytes,
        "stored_columns": _stored_to_json(survey, settings),
        "smooth": settings.smooth if settings is not None else None,
        "figures": settings.figures if settings is not None else None,
        "part": None if share is None else _share_to_json(share),
        "shards": [_shard_to_json(survey, contents) for contents in survey.shards],
        "parameters": plan.parameters,
        "quantized_parameters": plan.quantized_parameters,
        "percent_quantized": plan.percent_quantized,
        "quantized": [group.to_json() for group in group_by_kind(plan.quantized)],
        "left_alone": [group.to_json() for group in group_by_kind(plan.copied)],
        "tensors": [
            {
                "name": decision.spec.name,
                "dtype": decision.spec.dtype,
                "shape": list(decision.spec.shape),
                "int8": decision.quantize,
                "reason": decision.reason,
            }
            for decision in plan.decisions
        ],
        "copied_files": list(survey.weights.copied),
        "passed_over": [{"file": file, "reason": reason} for file, reason in survey.passed_over],
        "unmatched_patterns": list(plan.unmatched_patterns),
        "needs": {
            "download_bytes": needs.download_bytes,
            "disks": [
                {"directory": str(room.directory), "bytes": room.needed_bytes, "free_bytes": room.free_bytes}
                for room in needs.disks
            ],
            "buffer_bytes": needs.buffer_bytes,
            "cluster": None if needs.cluster is None else _cluster_to_json(needs.cluster),
            "ways": [way.to_json() for way in ways],
        },
    }


def _cluster_to_json(cluster: ClusterNeeds) -> dict[str, Any]:
    model = None if cluster.model is None else asdict(cluster.model)
    return {"shards_at_once": cluster.at_once, "shard": asdict(cluster.shard), "model": model}


def _share_to_json(share: PlannedShare) -> dict[str, Any]:
    return {
        "part": share.share.part,
        "parts": share.share.parts,
        "shards": list(share.shards),
        "source_bytes": share.source_bytes,
        "output_bytes": share.output_bytes,
    }


def _shard_to_json(survey: Survey, contents: ShardContents) -> dict[str, Any]:
    output, sidecar = survey.outputs[contents.file_name], survey.sidecars.get(contents.file_name)
    return {
        "source": contents.file_name,
        "source_bytes": contents.file_bytes,
        "output": output.file_name,
        "output_bytes": output.file_bytes,
        "sidecar": sidecar.file_name if sidecar is not None else None,
        "sidecar_bytes": sidecar.file_bytes if sidecar is not None else 0,
    }


def _stored_to_json(survey: Survey, settings: Settings | None) -> dict[str, Any] | None:
    """The largest possible number of stored columns, and how they will be chosen; None without stored columns."""
    if survey.stored_counts is None:
        return None
    counts = [count for count in survey.stored_counts.values() if count]
    chosen = {} if settings is None else asdict(settings)
    return {
        "columns": sum(counts),
        "layers": len(counts),
        "chosen_from": chosen.get("outliers"),
        "columns_a_layer": chosen.get("outlier_columns"),
        "budget": chosen.get("outlier_budget"),
        "calibration": chosen.get("calibration"),
    }


def show_plan(
    survey: Survey,
    needs: Needs,
    output: Path,
    settings: Settings | None = None,
    ways: Sequence[Way] = (),
    share: PlannedShare | None = None,
) -> None:
    """Print what a conversion would do, and that this was a dry run. `needs` are those of the part, if it is one."""
    console = stdout_console()
    plan = survey.plan
    ratio = survey.source_bytes / survey.output_bytes if survey.output_bytes else 0.0
    shards = f"{len(survey.shards)} shard" + ("s" if len(survey.shards) > 1 else "")
    for line in (
        f"[bold]{escape(survey.identity.name)}[/bold] → [bold]{escape(str(output))}[/bold], {shards} (dry run)",
        f"source    {survey.source_bytes:>19,} bytes  {human_bytes(survey.source_bytes):>10}",
        f"output    {survey.output_bytes:>19,} bytes  {human_bytes(survey.output_bytes):>10}  {ratio:.2f} x smaller",
        *_stored_lines(survey),
        *_share_lines(survey, share),
        f"download  {needs.download_bytes:>19,} bytes  {human_bytes(needs.download_bytes):>10}",
        *(_disk_line(room) for room in needs.disks),
        *_cluster_lines(needs.cluster),
        f"{plan.percent_quantized:.1f} % of {human_count(plan.parameters)} parameters become int8",
    ):
        console.print(line, soft_wrap=True)
    if settings is not None:
        console.print(_chosen_by(survey, settings))
        if not settings.figures:
            console.print("weight error: not measured")
    if ways:
        console.print_table(ways_table(ways, "Time and memory on this machine", needs.download_bytes))
    console.print_table(groups_table("Becomes int8", group_by_kind(plan.quantized)))
    console.print_table(groups_table("Not quantized", group_by_kind(plan.copied)))
    for file, reason in survey.passed_over:
        console.print(f"[dim]not copied:[/dim] {escape(file)} [dim]({escape(reason)})[/dim]", soft_wrap=True)


def _share_lines(survey: Survey, share: PlannedShare | None) -> list[str]:
    if share is None:
        return []
    sizes = f"{human_bytes(share.source_bytes)} → {human_bytes(share.output_bytes)}"
    return [f"[bold]{share.share}[/bold]: {len(share.shards)} of {counted(len(survey.shards), 'shard')}, {sizes}"]


def _cluster_lines(cluster: ClusterNeeds | None) -> list[str]:
    if cluster is None:
        return []
    lines = [f"cluster   {_task(cluster.shard)} for each of up to {counted(cluster.at_once, 'shard')} at once"]
    return lines if cluster.model is None else [*lines, f"cluster   {_task(cluster.model)} for a run of the model"]


def _task(needs: TaskNeeds) -> str:
    gpus = f", {counted(needs.gpus, 'GPU')}" if needs.gpus else ""
    return (
        f"{needs.memory_bytes:>19,} bytes  {human_bytes(needs.memory_bytes):>10}  {counted(needs.cores, 'core')}{gpus}"
    )


def _stored_lines(survey: Survey) -> list[str]:
    if survey.stored_counts is None:
        return []
    what = "stored columns" + (" and exponents of the smoothing" if survey.smooth else "")
    size_bytes, more = survey.sidecar_bytes, percent_more(survey.sidecar_bytes, survey.output_bytes)
    return [f"sidecars  {size_bytes:>19,} bytes  {human_bytes(size_bytes):>10}  {more} more, for {what}"]


def _chosen_by(survey: Survey, settings: Settings) -> str:
    if settings.outliers == NO_OUTLIERS or survey.stored_counts is None:
        return "no columns are stored exactly"
    if settings.most_columns == 0:
        return f"{_smoothed_how(settings)}; {escape(chosen_by(asdict(settings)))}"
    values = asdict(settings)
    columns = counted(sum(survey.stored_counts.values()), columns_word(values))
    by = escape(chosen_by(values))
    smoothed = f"; {_smoothed_how(settings)}" if survey.smooth else ""
    whole = f"{percent(settings.outlier_budget)} of the output"
    limit = f"{settings.most_columns:,} per layer" if settings.most_columns else whole
    return f"up to {columns} stored exactly, at most {limit}; {by}{smoothed}"


def _smoothed_how(settings: Settings) -> str:
    fine = settings.smooth == FINE_SMOOTHING
    return f"smoothed where the model proves to compute the same bits{', but for rounded scales' if fine else ''}"


def _disk_line(room: Room) -> str:
    fits = "fits" if room.needed_bytes <= room.free_bytes else "[red]does not fit[/red]"
    _, free = told_apart(room.needed_bytes, room.free_bytes)
    return f"disk      {room.needed_bytes:>19,} bytes  {human_bytes(room.needed_bytes):>10}  {fits}: {free} free"
