"""The strategies to choose outlier columns that work for a model, the best first.

Owns the rules of `auto`. Torch is imported once it is clear that a way needs it here: of what the weights tell, a
process that only hands tasks out needs none.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from int8cli.checkpoint.source import Source
from int8cli.columns.from_weights import counts_from_weights, strategy_from_weights
from int8cli.columns.wanted import AUTO, MODES, ColumnStrategy, ColumnsWanted, without_columns
from int8cli.errors import CANNOT_CALIBRATE, CannotRunError
from int8cli.model.extra import require_transformers
from int8cli.planning.survey import Survey
from int8cli.records.store import FROM_ACTIVATIONS, FROM_WEIGHTS, Settings
from int8cli.workers.torch_start import start_torch

# What a tokenizer is loaded from; without any of them there is nothing to run a model over.
_TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"}
)


def column_strategies(
    wanted: ColumnsWanted,
    source: Source,
    survey: Survey,
    settings: Settings,
    kept_in: Path,
    noted: Callable[[str], None],
) -> Iterator[ColumnStrategy]:
    """The ways that seem passable; one may still prove not to be, with UnsupportedModelError or the like.

    `kept_in` is the directory for what has to outlast a killed run. `noted` is told why a better way was left out.
    Raises TextError, StatisticsMismatchError, CheckpointError for what the user named.
    """
    if wanted.nothing(survey):
        yield without_columns(survey, settings)
        return
    mode = wanted.mode_to_go_on_with
    if mode not in MODES:
        yield _from_statistics(wanted, source, survey, settings)
        return
    if mode in (AUTO, FROM_ACTIVATIONS):
        try:
            way = _from_activations(wanted, source, survey, settings, kept_in)
        except CANNOT_CALIBRATE as error:
            if mode == FROM_ACTIVATIONS:
                raise
            noted(f"cannot calibrate ({error}); falling back")
        else:
            yield way
    if mode in (AUTO, FROM_WEIGHTS):
        counts = counts_from_weights(survey, wanted.limit)
        if counts or mode == FROM_WEIGHTS:
            yield strategy_from_weights(wanted, source, survey, settings, counts, kept_in)
    if mode == AUTO:
        yield without_columns(survey, settings)


def _from_statistics(wanted: ColumnsWanted, source: Source, survey: Survey, settings: Settings) -> ColumnStrategy:
    start_torch()
    from int8cli.columns.from_statistics import strategy_from_statistics

    return strategy_from_statistics(wanted, source, survey, settings)


def _from_activations(
    wanted: ColumnsWanted, source: Source, survey: Survey, settings: Settings, kept_in: Path
) -> ColumnStrategy:
    """Raises what a calibration would, as far as config.json and file names tell."""
    if not _TOKENIZER_FILES & set(source.list_files()):
        raise CannotRunError("there is no tokenizer beside the weights")
    require_transformers()
    start_torch()
    from int8cli.columns.from_activations import strategy_from_activations

    return strategy_from_activations(wanted, source, survey, settings, kept_in)
