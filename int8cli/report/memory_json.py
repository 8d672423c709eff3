"""A memory estimate as one JSON document. All sizes are bytes; null means unknown."""

from dataclasses import asdict
from typing import Any

from int8cli.estimate.answers import MachineAnswer, MemoryReport
from int8cli.estimate.cards import USABLE_RULE, Card, Placed
from int8cli.estimate.estimate import INT8, PRECISIONS, WORKSPACE_FORMULA, Estimate
from int8cli.estimate.fit import Answer, FitRow
from int8cli.estimate.kv_cache import DTYPE_BYTES
from int8cli.estimate.weights import Weights
from int8cli.report.memory import total_bytes

MEMORY_SCHEMA = "int8cli.memory/1"


def memory_to_json(report: MemoryReport) -> dict[str, Any]:
    """The whole report. `cards.answers` is about the requested cards."""
    estimate, use = report.estimate, report.use
    survey = estimate.survey
    return {
        "schema": MEMORY_SCHEMA,
        "model": survey.identity.name,
        "revision": survey.identity.revision,
        "parameters": estimate.weights.parameters,
        "percent_quantized": survey.plan.percent_quantized,
        "files": len(survey.shards),
        "stored": {"bytes": survey.source_bytes, "tensor_bytes_by_dtype": estimate.stored_dtypes},
        "weights": {**_weights(estimate.weights), "buffer_bytes": estimate.buffer_bytes},
        "output_bytes": survey.output_bytes,
        "parts": [{"part": part.name, **_weights(part.weights)} for part in estimate.parts],
        "units": [{"unit": unit.name, "part": unit.part, **_weights(weights)} for unit, weights in estimate.units],
        "largest_block": estimate.largest_block[0].name if estimate.largest_block else None,
        "not_held_in_memory": sorted(estimate.not_in_memory),
        "layouts": [asdict(share) for share in estimate.layouts],
        "kv_cache": _cache(report),
        "workspace": {
            "formula": WORKSPACE_FORMULA,
            "tokens": use.batch * use.context,
            "int8_bytes": estimate.workspace_bytes(use, INT8),
        },
        "total": {f"{precision}_bytes": total_bytes(report, precision) for precision in PRECISIONS},
        "conversion": {
            **_conversion(estimate),
            "ways": [way.to_json() for way in report.ways],
            "machines": [each.to_json() for each in report.on_machines],
        },
        "cards": {
            "usable": USABLE_RULE,
            "this_machine": _answers(report.here) if report.here is not None else [],
            "answers": [answer for machine in report.asked for answer in _answers(machine)],
            "shortages": [_shortage(machine) for machine in report.asked if machine.shortage is not None],
            "table": [_row(row) for row in report.table],
        },
    }


def _weights(weights: Weights) -> dict[str, Any]:
    return {
        "parameters": weights.parameters,
        "stored_bytes": weights.stored_bytes,
        "float32_bytes": weights.float32_bytes,
        "float16_bytes": weights.float16_bytes,
        "int8_bytes": weights.int8_bytes,
        "int8_data_bytes": weights.int8_data_bytes,
        "int8_scale_bytes": weights.int8_scale_bytes,
        "int8_rest_bytes": weights.int8_rest_bytes,
    }


def _cache(report: MemoryReport) -> dict[str, Any]:
    cache, use = report.estimate.cache, report.use
    return {
        "bytes": report.estimate.kv_bytes(use),
        "bytes_a_token": cache.bytes_a_token(DTYPE_BYTES[use.kv_dtype]),
        "context": use.context,
        "batch": use.batch,
        "dtype": use.kv_dtype,
        "own_context": cache.own_context,
        "understood": cache.layers is not None,
        "reason": cache.reason,
    }


def _conversion(estimate: Estimate) -> dict[str, int]:
    needs = estimate.conversion
    return {
        "download_bytes": needs.download_bytes,
        "output_bytes": needs.output_bytes,
        "buffer_bytes": needs.buffer_bytes,
        "disk_bytes": needs.disk_bytes,
        "disk_keeping_source_bytes": needs.disk_keeping_source_bytes,
    }


def _card(card: Card) -> dict[str, Any]:
    return {"card": card.name, "total_bytes": card.total_bytes, "usable_bytes": card.usable_bytes}


def _row(row: FitRow) -> dict[str, Any]:
    counts = {name: {"weights": count.weights, "in_use": count.in_use} for name, count in row.counts.items()}
    return {**_card(row.card), **counts}


def _answers(machine: MachineAnswer) -> list[dict[str, Any]]:
    return [{"machine": machine.name, **_answer(answer)} for answer in machine.answers]


def _shortage(machine: MachineAnswer) -> dict[str, Any]:
    assert machine.shortage is not None
    return {"machine": machine.name, **machine.shortage.to_json()}


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "precision": answer.precision,
        "fits": answer.fits,
        "holds_weights": answer.holds_weights,
        "largest_context": answer.largest_context,
        "placement": [_placed(placed) for placed in answer.placement.cards],
        "without_a_card": [load.name for load in answer.placement.without],
    }


def _placed(placed: Placed) -> dict[str, Any]:
    return {
        **_card(placed.card),
        "units": [load.name for load in placed.loads],
        "weight_bytes": placed.weight_bytes,
        "kv_bytes": placed.kv_bytes,
        "workspace_bytes": placed.workspace_bytes,
        "left_bytes": placed.left_bytes,
    }
