"""Convert a checkpoint, or plan the conversion.

Owns how a conversion is set up.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from int8cli.checkpoint.disk import system_errors
from int8cli.checkpoint.locate import opened_source
from int8cli.checkpoint.lock import refuse_if_in_use
from int8cli.checkpoint.own_files import OwnPath
from int8cli.commands.checks import check_convert, check_device
from int8cli.commands.conversion_job import Choose, ConversionJob
from int8cli.commands.conversion_results import ConversionPlan as ConversionPlan
from int8cli.commands.conversion_results import ConversionResult as ConversionResult
from int8cli.commands.in_parts import part_of, shards_of
from int8cli.commands.on_ray import joined_cluster
from int8cli.commands.options import ConvertOptions
from int8cli.commands.parallelism import choose_threads, choose_workers, start_workers_early
from int8cli.commands.places import chosen_output
from int8cli.commands.push import push_of
from int8cli.commands.wanted_columns import columns_wanted, why_not_smoothed
from int8cli.conversion.convert import ConversionRun
from int8cli.conversion.part import PartOutcome
from int8cli.machine.memory_use import peak_memory_bytes
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.layouts import LAYOUTS, layout_of
from int8cli.planning.mixtures import layout_shares
from int8cli.planning.room import AtOnce
from int8cli.planning.survey import survey_source
from int8cli.progress import SILENT, Progress
from int8cli.records.conversion import Settings
from int8cli.records.store import RecordStore
from int8cli.results.conversion import ConversionReport
from int8cli.workers.torch_start import torch_threads_restored

_DEFAULTS = ConvertOptions()


@system_errors()
def convert(
    model: str | Path,
    output: str | Path | None = None,
    options: ConvertOptions = _DEFAULTS,
    *,
    progress: Progress = SILENT,
    choose: Choose | None = None,
) -> ConversionResult:
    """Convert a checkpoint to LLM.int8(), shard by shard.

    `model` is a Hub id, a directory, or one checkpoint file. `output` is the directory to write, by default
    `<name>-int8` in the current directory. After an interruption, the same call resumes: finished shards are not
    converted again. `choose` is asked which way to take where "auto" would take longer than
    `conversion_job.LONG_S`; without it, the first one is taken.

    Raises OptionError for invalid options, and other children of Int8cliError for problems with the model, the network
    or the disk. After any exception, no file is half-written under its final name.
    """
    begun_s = time.monotonic()
    check_convert(options)
    output = chosen_output(output, str(model))
    start_workers_early(str(model), output, options)
    with torch_threads_restored(), _prepared(str(model), output, options, progress) as job:
        job.prepare()
        if choose is not None:
            job = job.chosen(choose)
        outcome = job.convert_part(job.part) if job.part is not None else PartOutcome(_all_of(job, model, options), ())
        peak = peak_memory_bytes() if job.run.workers == 1 and options.ray is None else None
        seconds = time.monotonic() - begun_s
        layouts = layout_shares(job.survey)
        return ConversionResult(output, outcome.report, seconds, peak, layouts, outcome.missing, outcome.to_publish)


@system_errors()
def plan_conversion(
    model: str | Path,
    output: str | Path | None = None,
    options: ConvertOptions = _DEFAULTS,
    *,
    progress: Progress = SILENT,
) -> ConversionPlan:
    """What `convert` would do with the same arguments: the plan by tensor, exact sizes, and the requirements.

    Fetches headers only and writes nothing. A cluster is joined, or started, to learn what it has. Raises what
    `convert` raises before it writes its first byte.
    """
    check_convert(options)
    output = chosen_output(output, str(model))
    with torch_threads_restored(), _prepared(str(model), output, options, progress) as job:
        if options.ray is None:
            return job.plan()
        with joined_cluster(str(model), options.ray, job.smoothed_survey, options) as cluster:
            return job.on(cluster).plan()


def _all_of(job: ConversionJob, model: str | Path, options: ConvertOptions) -> ConversionReport:
    """Convert all shards, here or on a cluster."""
    if options.ray is None:
        return job.convert()
    with joined_cluster(str(model), options.ray, job.smoothed_survey, options) as cluster:
        return job.on(cluster).convert()


def settings_of(options: ConvertOptions) -> Settings:
    """The options that determine the bytes of the output. The strategy for the outlier columns adds its part."""
    patterns = tuple(options.skip), tuple(options.only)
    exact = options.layout, options.threshold
    return Settings(*exact, *patterns, options.float32, figures=options.figures, inputs=options.inputs)


def _at_once(workers: int, options: ConvertOptions) -> AtOnce:
    """What is on the disk while each worker converts a shard: the next one is fetched, and the last one uploaded."""
    return AtOnce(None if options.keep_output else workers + 1, workers + 1 if workers > 1 else None)


@contextmanager
def _prepared(model: str, output: Path, options: ConvertOptions, progress: Progress) -> Iterator[ConversionJob]:
    if options.ray is None:  # else the machines of the cluster have it
        check_device(options.device)
    settings = settings_of(options)
    part = part_of(options)
    store = RecordStore(output, part.token if part is not None else None)
    store.refuse_links()
    refuse_if_in_use(output, store.own)
    known = store.conversion() if not options.overwrite else None
    wanted = columns_wanted(options, known.settings if known is not None else None)
    with opened_source(
        model,
        revision=options.revision,
        download_dir=store.unfinished.incoming_directory,
        output=output,
        keep_source=options.keep_source,
        retry_for_s=options.retry_for,
        progress=progress,
    ) as source:
        target = layout_of(options.layout, options.inputs) or LAYOUTS[options.layout]
        survey = survey_source(source, PlanOptions(settings.skip, settings.only), target)
        workers = options.workers or choose_workers(source, shards_of(part, survey), options.device)
        threads = options.threads or choose_threads(workers, options.device)
        run = ConversionRun(output, options.on_nonfinite, options.overwrite, workers, threads, options.device)
        run = replace(run, at_once=_at_once(workers, options))
        state = OwnPath(store.unfinished.calibration_directory, output, store.unfinished.aside)
        push = push_of(options, progress)
        yield ConversionJob(
            source, survey, settings, wanted, run, state, progress, why_not_smoothed(options), part, push
        )
