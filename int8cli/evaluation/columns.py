"""The outlier columns that a layer stores, chosen from a calibration as convert would choose them.

Owns how a calibration becomes columns. The text it ran on should not be the one that is evaluated.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from int8cli.errors import TextError
from int8cli.evaluation.subject import Subject
from int8cli.llm_int8.columns import choose_columns
from int8cli.model.text import Text
from int8cli.outliers.calibrate import CalibrateOptions, calibrate
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.progress import Progress
from int8cli.results.evaluation import StoredColumnsSummary


@dataclass(frozen=True, slots=True)
class ChosenColumns:
    """By linear layer, the columns to keep exact, sorted; and where they come from."""

    by_layer: Mapping[str, tuple[int, ...]]
    provenance: StoredColumnsSummary


def columns_from(statistics: OutlierStatistics, limit: int) -> ChosenColumns:
    """At most `limit` columns of each linear layer."""
    chosen = {
        linear.name: choose_columns(site.inputs, linear.weight_error, limit)
        for site in statistics.linear_sites
        for linear in site.linears
    }
    mean = sum(map(len, chosen.values())) / max(1, len(chosen))
    of = statistics.provenance
    return ChosenColumns(chosen, StoredColumnsSummary(limit, of.text, of.text_sha256, of.tokens, mean))


def calibrated_columns(
    subject: Subject, text: Text, evaluated: Text, limit: int, options: CalibrateOptions, progress: Progress
) -> ChosenColumns:
    """Calibrate a 16-bit subject and choose: a pass over its weights of its own.

    Raises TextError where that would be on the text that is evaluated, and what a calibration raises.
    """
    if text.sha256 == evaluated.sha256:
        raise TextError(
            f"{text.name} is what stored columns are calibrated on, and cannot be evaluated on",
            hint="Choose another text, or give statistics that were made on another one.",
        )
    assert subject.survey is not None
    progress.note("calibrating for stored columns: a pass over the weights of its own")
    return columns_from(calibrate(subject.runs, subject.survey, text, options, progress), limit)
