"""The outlier columns to store for each layer, chosen from a calibration as `convert` would choose them.

Owns how a calibration becomes columns. Its text should not be the text to evaluate on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from int8cli.errors import TextError
from int8cli.evaluation.subject import Subject
from int8cli.llm_int8.columns import choose_columns
from int8cli.llm_int8.limits import Steps
from int8cli.model.text import Text
from int8cli.outliers.calibrate import CalibrateOptions, calibrate
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.progress import Progress
from int8cli.results.evaluation import StoredColumnsSummary


@dataclass(frozen=True, slots=True)
class SmoothedColumns:
    """The exponents of a layer's input columns, int8 (in,), and the columns to store once it is smoothed.

    `steps` of an exponent are a factor of 2. `scaled` are the tensors that make the divided input.
    """

    exponents: Tensor
    stored: tuple[int, ...]
    steps: Steps
    scaled: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChosenColumns:
    """The sorted columns to store for each linear layer, and how they were chosen. `calibrated`: in this run.

    `smoothing` is that of each layer that is smoothed; None if the calibration did not look for any.
    """

    by_layer: Mapping[str, tuple[int, ...]]
    provenance: StoredColumnsSummary
    calibrated: bool = False
    smoothing: Mapping[str, SmoothedColumns] | None = None


def columns_from(statistics: OutlierStatistics, limit: int) -> ChosenColumns:
    """At most `limit` columns of each linear layer."""
    chosen = {
        linear.name: choose_columns(site.inputs, linear.weight_error, limit)
        for site in statistics.linear_sites
        for linear in site.linears
    }
    mean = sum(map(len, chosen.values())) / max(1, len(chosen))
    made_on = statistics.provenance
    summary = StoredColumnsSummary(limit, made_on.text, made_on.text_sha256, made_on.tokens, mean)
    return ChosenColumns(chosen, summary)


def calibrated_columns(
    subject: Subject, text: Text, evaluated: Text, limit: int, options: CalibrateOptions, progress: Progress
) -> ChosenColumns:
    """Calibrate a 16-bit subject, in a separate pass over its weights, and choose its columns.

    Raises TextError if the calibration text is the text to evaluate on, and the errors of a calibration.
    """
    if text.sha256 == evaluated.sha256:
        raise TextError(
            f"{text.name} is the text that chooses the stored columns, so it cannot be used for evaluation",
            hint="Choose another text, or give statistics made from another text.",
        )
    assert subject.survey is not None
    progress.note(f"Step 1 of 2: choosing exact columns{' and what to smooth' if options.smooth else ''}")
    statistics = calibrate(subject.runs, subject.survey, text, options, progress)
    smoothing = smoothing_from(statistics, limit) if options.smooth else None
    return replace(columns_from(statistics, limit), calibrated=True, smoothing=smoothing)


def smoothing_from(statistics: OutlierStatistics, limit: int) -> dict[str, SmoothedColumns]:
    """The proved smoothing of each linear layer that has one, and at most `limit` columns once it is smoothed."""
    found: dict[str, SmoothedColumns] = {}
    for site in statistics.linear_sites:
        if site.smoothing is None:
            continue
        how, after = site.smoothing, site.once_smoothed()
        scaled = tuple(each.tensor for each in how.scaled)
        for linear in after.linears:
            stored = choose_columns(after.inputs, linear.weight_error, limit)
            found[linear.name] = SmoothedColumns(how.exponents, stored, how.steps, scaled)
    return found
