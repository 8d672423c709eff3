"""Compare int8 methods on a model: its predictions, and the errors of its layers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from int8cli.checkpoint.disk import system_errors
from int8cli.checkpoint.locate import opened_source
from int8cli.checkpoint.source import Source
from int8cli.columns.from_statistics import require_same_model
from int8cli.columns.wanted import DEFAULT_OUTLIER_COLUMNS
from int8cli.commands.checks import check_device, check_evaluate
from int8cli.commands.options import EvaluateOptions
from int8cli.commands.places import work_directory
from int8cli.data import HELD_OUT_NAME, SAMPLE_NAME, held_out_text, sample_text
from int8cli.evaluation.columns import ChosenColumns, calibrated_columns, columns_from
from int8cli.evaluation.evaluate import evaluate as run_methods
from int8cli.evaluation.methods import Method, chosen_methods
from int8cli.evaluation.options import EvaluationRun, applicable
from int8cli.evaluation.subject import Subject, find_subject
from int8cli.model.memory import return_memory_promptly
from int8cli.model.sampling import Sampling
from int8cli.model.text import Text
from int8cli.outliers.calibrate import CalibrateOptions
from int8cli.outliers.statistics_file import load_statistics
from int8cli.progress import SILENT, Progress
from int8cli.results.evaluation import Evaluation
from int8cli.workers.torch_start import torch_threads_restored

# malloc reuses temporaries up to this size. Compared with 1 MiB, this needs half the CPU time and 80 MB more memory.
_MALLOC_REUSES_BYTES = 32 << 20
_DEFAULTS = EvaluateOptions()


@system_errors()
def evaluate(model: str | Path, options: EvaluateOptions = _DEFAULTS, *, progress: Progress = SILENT) -> Evaluation:
    """Run a model with each method and compare. All methods share one pass over the weights, one block in memory.

    `model` is a Hub id, a directory, or one checkpoint file, in 16 or 32 bit or written by `convert`. For a converted
    model, its own int8 tensors are evaluated. For any other model, a calibration on another text, in one more pass,
    chooses the columns to store. After an interruption, the same call resumes after the last finished block.

    Raises UnknownMethodError, TextError, StatisticsMismatchError, ReferenceModelError, NotEnoughMemoryError, and the
    errors of a bad checkpoint.
    """
    check_evaluate(options)
    check_device(options.device)
    methods = chosen_methods(options.methods)
    work = work_directory(options.work_dir, str(model), options.revision)
    with torch_threads_restored(), _sources(str(model), options, work, progress) as (source, reference):
        return _evaluate(source, reference, _Job(methods, options, work, progress))


@dataclass(frozen=True, slots=True)
class _Job:
    """What to evaluate, and how. `work` is the directory for saved state."""

    methods: tuple[Method, ...]
    options: EvaluateOptions
    work: Path
    progress: Progress


@contextmanager
def _sources(
    model: str, options: EvaluateOptions, work: Path, progress: Progress
) -> Iterator[tuple[Source, Source | None]]:
    """The model, and the model it was made from, if given.

    `options.revision` is that of the source if `model` is a local conversion, otherwise that of the model.
    """
    of_source = options.source is not None and os.path.exists(os.path.expanduser(model))
    revision = None if of_source else options.revision
    with opened_source(model, revision=revision, download_dir=work / "incoming", progress=progress) as source:
        if options.source is None:
            yield source, None
            return
        with opened_source(
            str(options.source),
            revision=options.revision if of_source else None,
            download_dir=work / "incoming-source",
            progress=progress,
        ) as reference:
            yield source, reference


def _evaluate(source: Source, reference: Source | None, job: _Job) -> Evaluation:
    return_memory_promptly(_MALLOC_REUSES_BYTES)
    options = job.options
    sampling = Sampling(options.tokens, options.sequence_length, options.seed)
    if options.text is not None:
        text = Text.read(options.text, sampling.tokens)
    else:
        text = Text.decode(HELD_OUT_NAME, held_out_text())
    subject = find_subject(source, reference)
    columns = _columns(subject, text, job)
    run = EvaluationRun(
        job.methods, sampling, subject.threshold, options.device, state_directory=job.work / "evaluation"
    )
    return run_methods(subject, text, columns, run, job.progress)


def _columns(subject: Subject, evaluated: Text, job: _Job) -> ChosenColumns | None:
    """The columns to store for a 16-bit model, if a method needs them: from statistics or from a calibration."""
    options = job.options
    if subject.converted is not None or not applicable(subject, job.methods).needs_columns:
        return None
    assert subject.survey is not None
    limit = DEFAULT_OUTLIER_COLUMNS if options.outlier_columns is None else options.outlier_columns
    if options.outliers is not None:
        statistics = load_statistics(options.outliers)
        require_same_model(statistics, subject.runs, subject.survey)
        if statistics.provenance.text_sha256 == evaluated.sha256:
            job.progress.note("warning: the statistics were made from the same text that is evaluated")
        return columns_from(statistics, limit)
    how = CalibrateOptions(device=options.device, state_directory=job.work / "blocks")
    sample = Text.decode(SAMPLE_NAME, sample_text())
    return calibrated_columns(subject, sample, evaluated, limit, how, job.progress)
