"""What the options of a conversion ask for: which columns to store, and whether to smooth."""

from int8cli.columns.wanted import AUTO, SMOOTH_MODES, ColumnsWanted
from int8cli.commands.options import ConvertOptions
from int8cli.llm_int8.limits import DEFAULT_OUTLIER_COLUMNS
from int8cli.machine.speed import usable_cores
from int8cli.model.sampling import Sampling
from int8cli.planning.layouts import compressed_tensors
from int8cli.records.conversion import FROM_WEIGHTS, NO_OUTLIERS, NO_SMOOTHING, STEPS, Settings


def columns_wanted(options: ConvertOptions, known: Settings | None) -> ColumnsWanted:
    """`known` are the settings of an unfinished conversion, which resumes as it began unless another way is named."""
    mode, limit = str(options.outliers), options.outlier_columns
    budget = options.outlier_budget or 0.0
    if limit is None:
        limit = DEFAULT_OUTLIER_COLUMNS if mode != NO_OUTLIERS and not budget else 0
    smooth = _smooth(options)
    if smooth not in SMOOTH_MODES:  # a statistics file, which columns that are to be chosen are chosen by too
        mode, limit = smooth, limit if mode != NO_OUTLIERS else 0
    smooths, scales = wants_smoothing(options), smooth if smooth in STEPS else None
    if options.smooth is None and known is not None and mode == AUTO:
        smooths = known.smooth != NO_SMOOTHING
        scales = known.smooth if smooths else None
    return ColumnsWanted(
        mode,
        limit,
        options.text,
        Sampling(options.tokens, options.sequence_length, options.seed),
        options.device,
        usable_cores(),
        known,
        smooths,
        budget,
        scales,
        must_smooth=smooth in STEPS,
    )


def wants_smoothing(options: ConvertOptions) -> bool:
    """Whether what the options choose columns by can also tell what to smooth, and is to."""
    smooth = _smooth(options)
    by_a_file = smooth not in SMOOTH_MODES
    return by_a_file or (smooth != NO_SMOOTHING and str(options.outliers) not in (FROM_WEIGHTS, NO_OUTLIERS))


def why_not_smoothed(options: ConvertOptions) -> str:
    """A line about a conversion that smooths nothing although its layout gains by it; empty for others."""
    mode = str(options.outliers)
    if _smooth(options) == AUTO and mode in (FROM_WEIGHTS, NO_OUTLIERS):
        known = "the weights alone" if mode == FROM_WEIGHTS else "nothing that is known of the activations"
        return f"not smoothed: that needs a run of the model or its statistics, and this conversion uses {known}"
    return ""


def _smooth(options: ConvertOptions) -> str:
    if options.smooth is not None:
        return str(options.smooth)
    return AUTO if options.layout == compressed_tensors.NAME else NO_SMOOTHING
