"""What is known about a conversion's stored columns before torch is imported: the settings, and the most columns.

Owns what a choice by activations writes into the settings, so that a directory with another conversion is refused
before anything slow begins.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from int8cli.checkpoint.config_file import CONFIG_FILE
from int8cli.checkpoint.reader import read_small
from int8cli.checkpoint.source import Source
from int8cli.columns.budget import spread_counts
from int8cli.columns.from_weights import counts_from_weights
from int8cli.columns.wanted import MODES, ColumnsWanted, at_most
from int8cli.data import SAMPLE_NAME, sample_text
from int8cli.errors import NoStatisticsYetError, StatisticsFileError, StatisticsMismatchError
from int8cli.llm_int8.limits import DEFAULT_OUTLIER_COLUMNS, EXACT_STEPS
from int8cli.model.extra import has_transformers
from int8cli.model.text import Text, require_bytes_for_a_sequence
from int8cli.planning.survey import Survey
from int8cli.records.conversion import (
    EXACT_SMOOTHING,
    FINE_SMOOTHING,
    FROM_ACTIVATIONS,
    FROM_STATISTICS,
    FROM_WEIGHTS,
    NO_OUTLIERS,
    NO_SMOOTHING,
    STEPS,
    Settings,
)
from int8cli.typed_json import parse_json

# Files a tokenizer is loaded from. Without any of them there is no text to run the model on.
TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"}
)

_FOUND = {
    EXACT_SMOOTHING: "powers of two",
    FINE_SMOOTHING: "scales in steps of 2^(1/4)",
    None: "nothing that smooths",
}


@dataclass(frozen=True, slots=True)
class PlannedCalibration:
    """A choice by activations: its text, and the survey and settings of a conversion that makes it."""

    text: Text
    survey: Survey
    settings: Settings


def planned_calibration(wanted: ColumnsWanted, survey: Survey, settings: Settings) -> PlannedCalibration:
    """Raises TextError for a text that cannot be read."""
    sampling = wanted.sampling
    if wanted.text is not None:
        text = Text.read(wanted.text, sampling.tokens)
    else:
        text = Text.decode(SAMPLE_NAME, sample_text())
    length = min(sampling.sequence_length, sampling.tokens)
    used = f"{text.name}: {sampling.tokens:,} tokens in sequences of {length:,}"
    used += f", seed {sampling.seed}, sha256 {text.sha256[:16]}"
    return PlannedCalibration(
        text,
        _storing(survey, wanted.limit, wanted),
        replace(
            settings,
            outliers=FROM_ACTIVATIONS,
            outlier_columns=wanted.limit,
            outlier_budget=wanted.budget,
            calibration=used,
            smooth=_smooth(wanted),
        ),
    )


def statistics_settings(wanted: ColumnsWanted, settings: Settings) -> Settings:
    """The settings of a choice by the statistics file. Raises StatisticsFileError if it cannot be read."""
    path = Path(wanted.mode)
    try:
        data = read_small(path)
    except OSError as error:
        raise StatisticsFileError(
            f"{path} is not a file of outlier statistics: {error.strerror or error}",
            hint="Running the model makes such a file.",
        ) from error
    chosen = replace(settings, outliers=FROM_STATISTICS, outlier_columns=wanted.limit, outlier_budget=wanted.budget)
    smooth = NO_SMOOTHING
    if wanted.smooth:
        found = _scales_in(data)
        require_scales(found, wanted.scales)
        smooth = found or EXACT_SMOOTHING
    return replace(chosen, calibration=f"statistics {xxhash.xxh3_128_hexdigest(data)}", smooth=smooth)


def require_scales(found: str | None, asked_for: str | None) -> None:
    """Raise StatisticsMismatchError unless statistics smooth by the scales asked for, by name; None asks for any."""
    if asked_for not in (None, found):
        raise StatisticsMismatchError(
            f"the statistics have {_FOUND[found]}, and {asked_for} smoothing is asked for",
            hint="Make statistics for it.",
        )


def _scales_in(data: bytes) -> str | None:
    """How a statistics file smooths, by its document and without torch; None if it says nothing of that.

    Who loads the file reports what cannot be read.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        document = parse_json(parse_json(data[8 : 8 + size])["__metadata__"]["int8cli"].encode())
        sites = document["sites"]
        steps = {site["smoothing"].get("steps", EXACT_STEPS) for site in sites if site.get("smoothing")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return next((name for name, each in STEPS.items() if each in steps), None)


def foreseen_settings(wanted: ColumnsWanted, source: Source, survey: Survey, settings: Settings) -> Settings:
    """The settings of the strategy that will probably be used.

    Raises TextError for a text that cannot be used, NoStatisticsYetError as `require_statistics_first`.
    """
    if wanted.nothing(survey):
        return settings
    mode = wanted.mode_to_resume
    if mode not in MODES:
        return statistics_settings(wanted, settings)
    if mode == FROM_WEIGHTS:
        return replace(settings, outliers=FROM_WEIGHTS, outlier_columns=wanted.limit)
    require_statistics_first(wanted, source, survey)
    planned = planned_calibration(wanted, survey, settings)
    require_bytes_for_a_sequence(planned.text, source, wanted.sampling)
    return planned.settings


def require_statistics_first(wanted: ColumnsWanted, source: Source, survey: Survey) -> None:
    """Raise NoStatisticsYetError if a budget would take a run of the model that downloads it once more.

    Columns are shared out when the model has run to its end, and only then is the first shard converted.
    """
    if wanted.budget and any(source.transfers(contents.file_name) for contents in survey.shards):
        raise NoStatisticsYetError(
            "a budget for the whole model needs statistics of all of it before the first shard is converted, "
            f"and {survey.identity.name} would be downloaded twice for that",
            option="outlier_budget",
            hint="Make statistics first, and choose by that file. Or download the model first.",
        )


def _storing(survey: Survey, limit: int, wanted: ColumnsWanted) -> Survey:
    """The survey of a conversion that stores so many columns of every linear or, with a budget, as much as it allows.

    How a budget is shared is not known yet, so it is spread evenly here.
    """
    if wanted.budget:
        counts = spread_counts(survey, wanted.budget)
    else:
        counts = {each.spec.name: at_most(each, limit) for each in survey.plan.quantized}
    return replace(survey, stored_counts=counts, smooth=wanted.steps)


def _smooth(wanted: ColumnsWanted) -> str:
    return (wanted.scales or EXACT_SMOOTHING) if wanted.smooth else NO_SMOOTHING


def may_run(source: Source) -> bool:
    """Whether the model can probably be run: transformers, a config and a tokenizer are there."""
    files = set(source.list_files())
    return has_transformers() and CONFIG_FILE in files and bool(TOKENIZER_FILES & files)


def surveys_by_mode(wanted: ColumnsWanted, source: Source, survey: Survey) -> dict[str, Survey]:
    """Every mode that can be chosen for this model, with a survey of what it writes, the one of `auto` first."""
    if not survey.plan.quantized:
        return {NO_OUTLIERS: survey}
    limit = wanted.limit if wanted.smooth else wanted.limit or DEFAULT_OUTLIER_COLUMNS
    found = {}
    if may_run(source):
        found[FROM_ACTIVATIONS] = _storing(survey, limit, wanted)
    if wanted.budget or wanted.must_smooth:
        return found or {NO_OUTLIERS: survey}
    counts = counts_from_weights(survey, limit) if limit else {}
    if counts:
        found[FROM_WEIGHTS] = replace(survey, stored_counts=counts)
    return found | {NO_OUTLIERS: replace(survey, stored_counts=None)}
