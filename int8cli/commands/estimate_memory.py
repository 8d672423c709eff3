"""Estimate the memory a model needs and the cards it fits on, before any weights are downloaded."""

from dataclasses import replace
from pathlib import Path

from int8cli.checkpoint.disk import system_errors
from int8cli.checkpoint.locate import opened_source
from int8cli.columns.wanted import AUTO, ColumnsWanted
from int8cli.commands.checks import check_estimate
from int8cli.commands.options import ConvertOptions, EstimateOptions
from int8cli.commands.places import default_output
from int8cli.commands.ways import speed_without_torch, ways_to_convert
from int8cli.conversion.convert import ConversionRun
from int8cli.estimate.answers import MemoryReport, memory_report
from int8cli.estimate.cards import parse_cards
from int8cli.estimate.estimate import Use
from int8cli.estimate.estimate import estimate_memory as estimate_of
from int8cli.estimate.machines import on_machines
from int8cli.llm_int8.limits import DEFAULT_OUTLIER_COLUMNS
from int8cli.model.memory import available_bytes
from int8cli.model.sampling import Sampling
from int8cli.planning.blocks import THREADS_FOR_A_SHARD
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.layouts import LAYOUTS
from int8cli.planning.survey import survey_source
from int8cli.progress import SILENT, Progress

_DEFAULTS = EstimateOptions()


@system_errors()
def estimate_memory(
    model: str | Path, options: EstimateOptions = _DEFAULTS, *, progress: Progress = SILENT
) -> MemoryReport:
    """Estimate a model's weights by precision, KV cache and workspace, what a conversion needs, and the cards needed.

    Reads only config.json and file headers. `model` is a Hub id, a directory, or one checkpoint file. Raises
    UnknownCardError for unknown cards, and the errors of a bad checkpoint.
    """
    check_estimate(options)
    machines = {text: parse_cards(text) for text in options.gpu}
    output = default_output(str(model))
    with opened_source(str(model), revision=options.revision, download_dir=output, progress=progress) as source:
        survey = survey_source(source, PlanOptions(), LAYOUTS[options.layout])
        estimate = estimate_of(source, survey, output, threads=THREADS_FOR_A_SHARD)
        wanted = ColumnsWanted(AUTO, DEFAULT_OUTLIER_COLUMNS, sampling=Sampling(ConvertOptions().tokens))
        speed = speed_without_torch(progress)
        ways = ways_to_convert(source, survey, ConversionRun(output, threads=THREADS_FOR_A_SHARD), wanted, speed)
        shared = on_machines(survey, options.machines, speed, options.network)
    use = Use(options.context or estimate.cache.default_context, options.batch, options.kv_dtype)
    return replace(memory_report(estimate, use, machines, ways, available_bytes("cpu")), on_machines=shared)
