"""Compare int8 methods on a model: its predictions, and the errors of its layers."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from int8cli.checkpoint.disk import system_errors
from int8cli.checkpoint.locate import opened_source
from int8cli.checkpoint.source import Source
from int8cli.commands.checks import check_device, check_evaluate
from int8cli.commands.first_words import announce
from int8cli.commands.options import EvaluateOptions
from int8cli.commands.places import work_directory
from int8cli.data import HELD_OUT_NAME, held_out_text
from int8cli.model.extra import require_installed
from int8cli.model.sampling import Sampling
from int8cli.model.text import Text, require_bytes_for_a_sequence
from int8cli.progress import SILENT, Progress
from int8cli.results.evaluation import Evaluation
from int8cli.results.method_names import chosen_keys
from int8cli.workers.torch_start import torch_threads_restored

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
    begun_s = time.monotonic()
    check_evaluate(options)
    check_device(options.device)
    methods = chosen_keys(options.methods)
    sampling = Sampling(options.tokens, options.sequence_length, options.seed)
    text = _text(options.text, sampling)
    require_installed()
    work = work_directory(options.work_dir, str(model), options.revision)
    with torch_threads_restored(), _sources(str(model), options, work, progress) as (source, reference):
        require_bytes_for_a_sequence(text, reference or source, sampling)
        announce(source, progress)
        from int8cli.commands.evaluate_job import EvaluationJob

        found = EvaluationJob(methods, text, sampling, options, work, progress).run(source, reference)
        return replace(found, seconds=time.monotonic() - begun_s)  # of the calibration too


def _text(chosen: Path | None, sampling: Sampling) -> Text:
    return Text.decode(HELD_OUT_NAME, held_out_text()) if chosen is None else Text.read(chosen, sampling.tokens)


@contextmanager
def _sources(
    model: str, options: EvaluateOptions, work: Path, progress: Progress
) -> Iterator[tuple[Source, Source | None]]:
    """The model, and the model it was made from, if given.

    `options.revision` is that of the source if `model` is a local conversion, otherwise that of the model.
    """
    of_source = options.source is not None and os.path.exists(os.path.expanduser(model))
    revision = None if of_source else options.revision
    with opened_source(
        model,
        revision=revision,
        download_dir=work / "incoming",
        retry_for_s=options.retry_for,
        progress=progress,
    ) as source:
        if options.source is None:
            yield source, None
            return
        with opened_source(
            str(options.source),
            revision=options.revision if of_source else None,
            download_dir=work / "incoming-source",
            retry_for_s=options.retry_for,
            progress=progress,
        ) as reference:
            yield source, reference
