"""Find the feature dimensions of a model that carry outliers. Torch is imported once options and text are checked."""

from pathlib import Path
from typing import TYPE_CHECKING

from int8cli.checkpoint.disk import system_errors
from int8cli.checkpoint.locate import opened_source
from int8cli.checkpoint.source import Source
from int8cli.columns.choose import falling_back
from int8cli.commands.checks import check_device, check_inspect
from int8cli.commands.first_words import announce, announce_duration
from int8cli.commands.options import InspectOptions
from int8cli.commands.places import work_directory
from int8cli.commands.ways import speed_here
from int8cli.data import SAMPLE_NAME, sample_text
from int8cli.errors import MissingExtraError, UnsupportedModelError
from int8cli.estimate.ways import forwards_s, smoothing_s
from int8cli.llm_int8.limits import EXACT_STEPS
from int8cli.model.extra import require_installed
from int8cli.model.memory import return_memory_promptly
from int8cli.model.sampling import Sampling
from int8cli.model.text import Text, require_bytes_for_a_sequence
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.survey import Survey, survey_source
from int8cli.progress import SILENT, Progress
from int8cli.records.conversion import EXACT_SMOOTHING, NO_SMOOTHING, STEPS
from int8cli.workers.torch_start import torch_threads_restored

if TYPE_CHECKING:
    from int8cli.outliers.statistics import OutlierStatistics
    from int8cli.outliers.suspects import WeightSuspects

_DEFAULTS = InspectOptions()


@system_errors()
def inspect_outliers(
    model: str | Path, options: InspectOptions = _DEFAULTS, *, progress: Progress = SILENT
) -> "OutlierStatistics | WeightSuspects":
    """Find outliers by running a model on text, one block in memory at a time, or suspects from its weights alone.

    `model` is a Hub id, a directory, or one checkpoint file. After an interruption, the same call resumes after the
    last finished block. The result is suspects if `evidence` is "weights", or if it is None and the model cannot be
    run.

    Raises MissingExtraError or UnsupportedModelError if `evidence` is "activations" and the model cannot be run,
    NotEnoughMemoryError if a block does not fit, TextError, and the errors of a bad checkpoint.
    """
    check_inspect(options)
    check_device(options.device)
    sampling = Sampling(options.tokens, options.sequence_length, options.seed)
    text = _text(options.text, sampling)
    work = work_directory(options.work_dir, str(model), options.revision)
    with (
        torch_threads_restored(),
        opened_source(
            str(model),
            revision=options.revision,
            download_dir=work / "incoming",
            retry_for_s=options.retry_for,
            progress=progress,
        ) as source,
    ):
        survey = survey_source(source, PlanOptions())
        runs = _can_run(options, progress)
        if runs:
            require_bytes_for_a_sequence(text, source, sampling)
        announce(source, progress, runs=runs)
        from int8cli.outliers.suspects import find_suspects

        if runs:
            try:
                return _run_model(source, survey, text, sampling, options, work / "blocks", progress)
            except (MissingExtraError, UnsupportedModelError) as error:
                if options.evidence == "activations":
                    raise
                progress.note(falling_back(error, "the weights"))
        return find_suspects(source, survey)


def _can_run(options: InspectOptions, progress: Progress) -> bool:
    """Whether to run the model. Says why not, if nothing was asked for. Raises MissingExtraError for "activations"."""
    if options.evidence == "weights":
        return False
    try:
        require_installed()
    except MissingExtraError as error:
        if options.evidence == "activations":
            raise
        progress.note(falling_back(error, "the weights"))
        return False
    return True


def _text(chosen: Path | None, sampling: Sampling) -> Text:
    return Text.decode(SAMPLE_NAME, sample_text()) if chosen is None else Text.read(chosen, sampling.tokens)


def _run_model(
    source: Source,
    survey: Survey,
    text: Text,
    sampling: Sampling,
    options: InspectOptions,
    state: Path,
    progress: Progress,
) -> "OutlierStatistics":
    from int8cli.outliers.calibrate import CalibrateOptions, calibrate

    return_memory_promptly()
    seconds = forwards_s(survey, speed_here(options.device), sampling.tokens, 2)
    smooth = EXACT_SMOOTHING if options.smooth is True else options.smooth or NO_SMOOTHING
    if smooth != NO_SMOOTHING:
        seconds += smoothing_s(survey, speed_here(options.device), sampling, STEPS[smooth])
    announce_duration(f"running the model on {sampling.tokens:,} tokens", seconds, progress)
    how = CalibrateOptions(
        sampling,
        options.threshold,
        options.device,
        state,
        smooth=smooth != NO_SMOOTHING,
        smooth_steps=STEPS.get(smooth, EXACT_STEPS),
    )
    return calibrate(source, survey, text, how, progress)
