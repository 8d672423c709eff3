"""The wording for smoothing: what was smoothed, and what was left alone and why."""

from collections.abc import Iterator

from int8cli.planning.exponents import columns_name, rows_name
from int8cli.report import markdown
from int8cli.results.smoothing import SmoothingSummary
from int8cli.results.units import counted

_EXACT = (
    "Powers of two lose no digits: in 16 bit, the smoothed model computes the same bits as the original. This was "
    "checked block by block when the scales were chosen."
)
_FINE = (
    "The scales are in steps of 2^(1/4), finer than powers of two, so the divided tensors are rounded: each value is "
    "the nearest that its dtype has, in bfloat16 within 0.4 %. With powers of two in place of these scales no bit "
    "changes; this was checked block by block when the scales were chosen."
)


def smoothed_line(summary: SmoothingSummary) -> str:
    """`195 of 210 layers, exactly; left alone: 15 layers (no powers of two improve its int8 product)`."""
    text = f"{summary.smoothed:,} of {counted(summary.layers, 'layer')}"
    if summary.smoothed:
        text += ", exactly, by powers of two" if summary.exact else ", in steps of 2^(1/4), which rounds norms"
    left = "; ".join(f"{count:,} ({reason})" for reason, count in summary.reasons)
    return f"{text}; left alone: {left}" if left else text


def smoothing_section(summary: SmoothingSummary) -> Iterator[str]:
    """What the model card says."""
    yield "## Smoothing\n"
    yield (
        f"{summary.smoothed:,} of {counted(summary.layers, 'int8 layer')} are smoothed: each input column is divided "
        f"by {'a power of two' if summary.exact else 'a scale'} where it is computed, and the matching column of the "
        "weight is multiplied by it, so that both lose less in int8. The division is in "
        f"{counted(summary.scaled_tensors, 'tensor')} in front of these layers: gains and biases of norms, and rows of "
        "earlier layers. "
        f"{_EXACT if summary.exact else _FINE}\n"
    )
    if summary.reasons:
        yield "Left alone:\n"
        yield from (f"- {counted(count, 'layer')}: {markdown.text(reason)}" for reason, count in summary.reasons)
        yield ""
    columns, rows = columns_name("X", summary.steps), rows_name("T", summary.steps)
    yield (
        f"For a layer `X`, `int8/outliers` has `{columns}` (int8, one for each input column), and for a divided tensor "
        f"`T` it has `{rows}`. `int8cli dequantize` undoes them{'' if summary.exact else ', except for rounding'}.\n"
    )
