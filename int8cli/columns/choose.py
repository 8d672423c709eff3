"""The strategies for choosing outlier columns that may work for a model, best first.

Owns the rules of `auto`. Imports torch only for a strategy that needs it in this process: if the weights choose the
columns, only the workers need torch.
"""

from collections.abc import Callable, Iterator

from int8cli.checkpoint.source import Source
from int8cli.columns.foreseen import TOKENIZER_FILES, require_statistics_first
from int8cli.columns.from_weights import counts_from_weights, strategy_from_weights
from int8cli.columns.wanted import AUTO, MODES, ColumnStrategy, ColumnsWanted, without_columns
from int8cli.errors import CANNOT_CALIBRATE, CannotRunError, Int8cliError, MissingExtraError
from int8cli.model.extra import require_transformers
from int8cli.planning.survey import Survey
from int8cli.records.conversion import FROM_ACTIVATIONS, FROM_WEIGHTS, Settings
from int8cli.workers.torch_start import start_torch

# What a fallback leaves out too, where it was wanted.
WITHOUT_SMOOTHING = ", without smoothing"


def column_strategies(
    wanted: ColumnsWanted,
    source: Source,
    survey: Survey,
    settings: Settings,
    note: Callable[[str], None],
) -> Iterator[ColumnStrategy]:
    """The strategies that look possible. Each may still fail with one of the errors in CANNOT_CALIBRATE.

    `note` gets the reason if a better strategy is impossible. Raises TextError, StatisticsMismatchError and
    CheckpointError for files that the user named.
    """
    if wanted.nothing(survey):
        yield without_columns(survey, settings)
        return
    mode = wanted.mode_to_resume
    if mode not in MODES:
        yield _from_statistics(wanted, source, survey, settings)
        return
    if mode in (AUTO, FROM_ACTIVATIONS):
        try:
            strategy = _from_activations(wanted, source, survey, settings)
        except CANNOT_CALIBRATE as error:
            if mode == FROM_ACTIVATIONS or wanted.budget or wanted.must_smooth:
                raise
            by_weights = wanted.limit and counts_from_weights(survey, wanted.limit)
            fallback = "the weights" if by_weights else "no outlier columns"
            note(falling_back(error, fallback + (WITHOUT_SMOOTHING if wanted.smooth else "")))
        else:
            yield strategy
    if wanted.budget or wanted.must_smooth:  # nothing else can share it out, or smooth
        return
    if mode in (AUTO, FROM_WEIGHTS):
        counts = counts_from_weights(survey, wanted.limit) if wanted.limit else {}
        if counts or mode == FROM_WEIGHTS:
            yield strategy_from_weights(wanted, survey, settings, counts)
    if mode == AUTO:
        yield without_columns(survey, settings)


def falling_back(error: Int8cliError, fallback: str) -> str:
    """The line that says why the model is not run, what is done instead and, if a package is missing, its command."""
    command = f": {error.hint.rstrip('.')}" if isinstance(error, MissingExtraError) else ""
    return f"cannot calibrate ({error}{command}); falling back to {fallback}"


def _from_statistics(wanted: ColumnsWanted, source: Source, survey: Survey, settings: Settings) -> ColumnStrategy:
    start_torch()
    from int8cli.columns.from_statistics import strategy_from_statistics

    return strategy_from_statistics(wanted, source, survey, settings)


def _from_activations(wanted: ColumnsWanted, source: Source, survey: Survey, settings: Settings) -> ColumnStrategy:
    """Raises the errors of a calibration that config.json and file names already show."""
    require_statistics_first(wanted, source, survey)
    if not TOKENIZER_FILES & set(source.list_files()):
        raise CannotRunError("the checkpoint has no tokenizer")
    require_transformers()
    start_torch()
    from int8cli.columns.from_activations import strategy_from_activations

    return strategy_from_activations(wanted, survey, settings)
