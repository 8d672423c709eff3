"""The wording for stored columns: how they were chosen, and that suspects are only a guess.

Owns the phrases that the terminal, the card and the dry run share.
"""

from collections.abc import Mapping
from typing import Any

from int8cli.records.conversion import FROM_ACTIVATIONS, FROM_STATISTICS, FROM_WEIGHTS
from int8cli.results.conversion import ConversionReport
from int8cli.results.stored_columns import StoredSummary
from int8cli.results.units import counted, percent

SUSPECTS = "guessed from the weights, not confirmed by running the model"


def chosen_by(settings: Mapping[str, Any]) -> str:
    """How the columns were chosen, from the settings of a conversion."""
    budget = settings.get("outlier_budget")
    shared = f", {percent(budget)} of the output shared out over all layers" if budget else ""
    return _chosen_from(settings) + shared


def _chosen_from(settings: Mapping[str, Any]) -> str:
    chosen_from, calibration = settings["outliers"], settings["calibration"]
    if chosen_from == FROM_WEIGHTS:
        return SUSPECTS
    if chosen_from == FROM_ACTIVATIONS:
        return f"chosen by running the model on {calibration}" if calibration else "chosen by running the model"
    if chosen_from == FROM_STATISTICS:
        digest = calibration.removeprefix("statistics ")
        return f"chosen from the statistics of a calibration (file {digest})" if digest else "chosen from statistics"
    return f"chosen by {chosen_from}"


def columns_word(settings: Mapping[str, Any]) -> str:
    return "suspect column" if settings["outliers"] == FROM_WEIGHTS else "column"


def how_many(report: ConversionReport, stored: StoredSummary) -> str:
    """`1,680 columns of 210 layers`."""
    columns = counted(stored.total.columns, columns_word(report.settings))
    return f"{columns} of {counted(stored.total.layers, 'layer')}"


def in_sidecars(report: ConversionReport) -> str:
    """What the sidecars of a conversion hold, in a word or two."""
    if report.stored is not None and not report.stored.total.columns and report.smoothing is not None:
        return "exponents of the smoothing"
    return "stored columns"


def output_error(stored: StoredSummary, emphasis: str = "{}") -> str:
    """`1.2 % plain int8, at most 1.0 % with exact columns`, as far as there are any; `stored` must have errors."""
    error = stored.total.error
    assert error is not None
    plain = f"{percent(error.all_int8)} plain int8"
    if not stored.total.columns:
        return plain
    at_most = "" if stored.basis == "measured" else "at most "
    return f"{plain}, {at_most}{emphasis.format(percent(error.with_stored))} with exact columns"


def percent_more(extra_bytes: int, output_bytes: int) -> str:
    """How much stored columns add to the size of an output: `1.6 %`."""
    percent = 100 * extra_bytes / output_bytes if output_bytes else 0.0
    return f"{percent:.1f} %" if percent >= 0.1 or not extra_bytes else f"{percent:.2g} %"
