"""Find the feature dimensions of a model that carry outliers."""

from pathlib import Path

from int8cli.checkpoint.disk import system_errors
from int8cli.checkpoint.locate import opened_source
from int8cli.checkpoint.source import Source
from int8cli.commands.checks import check_device, check_inspect
from int8cli.commands.options import InspectOptions
from int8cli.commands.places import work_directory
from int8cli.data import SAMPLE_NAME, sample_text
from int8cli.errors import MissingExtraError, UnsupportedModelError
from int8cli.model.memory import return_memory_promptly
from int8cli.model.sampling import Sampling
from int8cli.model.text import Text
from int8cli.outliers.calibrate import CalibrateOptions, calibrate
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.outliers.suspects import WeightSuspects, find_suspects
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.survey import Survey, survey_source
from int8cli.progress import SILENT, Progress
from int8cli.workers.torch_start import torch_threads_restored

_DEFAULTS = InspectOptions()


@system_errors()
def inspect_outliers(
    model: str | Path, options: InspectOptions = _DEFAULTS, *, progress: Progress = SILENT
) -> OutlierStatistics | WeightSuspects:
    """Find outliers by running a model on text, one block in memory at a time, or suspects from its weights alone.

    `model` is a Hub id, a directory, or one checkpoint file. After an interruption, the same call resumes after the
    last finished block. The result is suspects if `evidence` is "weights", or if it is None and the model cannot be
    run.

    Raises MissingExtraError or UnsupportedModelError if `evidence` is "activations" and the model cannot be run,
    NotEnoughMemoryError if a block does not fit, TextError, and the errors of a bad checkpoint.
    """
    check_inspect(options)
    check_device(options.device)
    work = work_directory(options.work_dir, str(model), options.revision)
    with (
        torch_threads_restored(),
        opened_source(
            str(model), revision=options.revision, download_dir=work / "incoming", progress=progress
        ) as source,
    ):
        survey = survey_source(source, PlanOptions())
        if options.evidence != "weights":
            try:
                return _run_model(source, survey, options, work / "blocks", progress)
            except (MissingExtraError, UnsupportedModelError) as error:
                if options.evidence == "activations":
                    raise
                progress.note(f"cannot calibrate ({error}); falling back to the weights")
        return find_suspects(source, survey)


def _run_model(
    source: Source, survey: Survey, options: InspectOptions, state: Path, progress: Progress
) -> OutlierStatistics:
    return_memory_promptly()
    sampling = Sampling(options.tokens, options.sequence_length, options.seed)
    if options.text is not None:
        text = Text.read(options.text, sampling.tokens)
    else:
        text = Text.decode(SAMPLE_NAME, sample_text())
    how = CalibrateOptions(sampling, options.threshold, options.device, state)
    return calibrate(source, survey, text, how, progress)
