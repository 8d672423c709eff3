"""What is known of a conversion's stored columns before torch is imported: the settings, and how many there will be.

Owns what a choice by activations writes into the settings. With it a directory that holds another conversion is refused
before anything slow begins.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.source import Source
from int8cli.columns.wanted import MODES, ColumnsWanted, at_most
from int8cli.data import SAMPLE_NAME, sample_text
from int8cli.model.text import Text, require_bytes_for_a_sequence
from int8cli.planning.survey import Survey
from int8cli.records.store import FROM_ACTIVATIONS, FROM_STATISTICS, FROM_WEIGHTS, Settings


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
        replace(survey, stored_counts={each.spec.name: at_most(each, wanted.limit) for each in survey.plan.quantized}),
        replace(settings, outliers=FROM_ACTIVATIONS, outlier_columns=wanted.limit, calibration=used),
    )


def statistics_settings(wanted: ColumnsWanted, settings: Settings) -> Settings:
    """Those of a choice by the statistics file that is wanted. Raises OutputError if it cannot be read."""
    path = Path(wanted.mode)
    with disk_errors(path):
        digest = xxhash.xxh3_128_hexdigest(path.read_bytes())
    chosen = replace(settings, outliers=FROM_STATISTICS, outlier_columns=wanted.limit)
    return replace(chosen, calibration=f"statistics {digest}")


def foreseen_settings(wanted: ColumnsWanted, source: Source, survey: Survey, settings: Settings) -> Settings:
    """The settings of the strategy that will probably be taken. Raises TextError for a text that cannot be used."""
    if wanted.nothing(survey):
        return settings
    mode = wanted.mode_to_resume
    if mode not in MODES:
        return statistics_settings(wanted, settings)
    if mode == FROM_WEIGHTS:
        return replace(settings, outliers=FROM_WEIGHTS, outlier_columns=wanted.limit)
    planned = planned_calibration(wanted, survey, settings)
    require_bytes_for_a_sequence(planned.text, source, wanted.sampling)
    return planned.settings
