"""The wording for exact smoothing: what was smoothed, and what was left alone and why."""

from collections.abc import Iterator

from int8cli.report import markdown
from int8cli.results.smoothing import SmoothingSummary
from int8cli.results.units import counted


def smoothed_line(summary: SmoothingSummary) -> str:
    """`195 of 210 layers, exactly; left alone: 15 layers (no powers of two make their int8 product better)`."""
    text = f"{summary.smoothed:,} of {counted(summary.layers, 'layer')}"
    text += ", exactly, by powers of two" if summary.smoothed else ""
    left = "; ".join(f"{count:,} ({reason})" for reason, count in summary.reasons)
    return f"{text}; left alone: {left}" if left else text


def smoothing_section(summary: SmoothingSummary) -> Iterator[str]:
    """What the model card says."""
    yield "## Smoothing\n"
    yield (
        f"{summary.smoothed:,} of {counted(summary.layers, 'int8 layer')} are smoothed: an input column is divided by "
        "a power of two where it is made, and the column of the weight multiplied by it, so that both are easier to "
        f"round. {counted(summary.scaled_tensors, 'tensor')} in front of these layers (gains and biases of norms, "
        "rows of earlier layers) are divided for it. Powers of two lose no digits: in 16 bit, the smoothed model "
        "computes the same bits as the original, which was checked block by block when this was made.\n"
    )
    if summary.reasons:
        yield "Left alone:\n"
        yield from (f"- {counted(count, 'layer')}: {markdown.text(reason)}" for reason, count in summary.reasons)
        yield ""
    yield (
        "For a layer `X`, `int8/outliers` has `X.smooth_exponents` (int8, one for each input column), and for a "
        "divided tensor `T` it has `T.smooth_row_exponents`. `int8cli dequantize` undoes them.\n"
    )
