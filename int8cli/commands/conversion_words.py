"""What a conversion says about itself before it begins: what it reads and writes, and how it chooses columns."""

from pathlib import Path

from int8cli.columns.wanted import ColumnStrategy, ColumnsWanted
from int8cli.commands.in_parts import shards_of, sizes_of
from int8cli.commands.push import Push
from int8cli.commands.ways import speed_here
from int8cli.conversion.part import PartRun
from int8cli.estimate.ways import calibration_s
from int8cli.planning.survey import Survey
from int8cli.records.conversion import FROM_ACTIVATIONS, FROM_STATISTICS, NO_OUTLIERS, NO_SMOOTHING, WEIGHTS_ONLY
from int8cli.results.units import human_bytes, human_seconds, percent


def first_line(survey: Survey, output: Path, push: Push | None, part: PartRun | None) -> str:
    """The source, where it goes, and the sizes of both; for a part, also its own."""
    to = str(output) if push is None else f"{output} and {push.label}"
    line = f"{survey.identity.name}: {sizes_of(survey)} → {to}: {human_bytes(survey.output_bytes)}"
    if part is not None and part.share is not None:
        line += f"; {part.share}: {sizes_of(shards_of(part, survey))}"
    return line


def described(strategy: ColumnStrategy, wanted: ColumnsWanted) -> str:
    """One line about how the outlier columns are chosen, and what that costs."""
    settings = strategy.settings
    if settings.outliers == NO_OUTLIERS:
        return "Storing no outlier columns."
    if settings.outliers == FROM_ACTIVATIONS:
        tokens = f"{wanted.sampling.tokens:,} {'sample tokens' if wanted.text is None else 'tokens'}"
        seconds = calibration_s(strategy.survey, speed_here(wanted.device), wanted.sampling)
        chosen = f"by running the model on {tokens} (about {human_seconds(seconds)})"
    elif settings.outliers == FROM_STATISTICS:
        chosen = "from the statistics file"
        if settings.smooth != NO_SMOOTHING and settings.inputs == WEIGHTS_ONLY:
            chosen += " (its exponents are those for int8 inputs; a run of the model finds those for 16-bit inputs)"
    else:
        chosen = "from the weights alone, without running the model"
    size = human_bytes(strategy.survey.sidecar_bytes)
    if not wanted.stores:
        return f"Finding what to smooth {chosen}."
    what = "outlier columns" + (" and what to smooth" if strategy.survey.smooth else "")
    if wanted.budget:
        return f"Choosing {what} {chosen}. Up to {percent(wanted.budget)} of the output for all layers, +{size}."
    return f"Choosing {what} {chosen}. Up to {settings.outlier_columns} columns per layer, +{size}."


def fallback_to(strategy: ColumnStrategy) -> str:
    """What is used instead of a run of the model."""
    return "no outlier columns" if strategy.settings.outliers == NO_OUTLIERS else "the weights"
