"""A budget of bytes for the stored columns of a whole model, before it is known how they are shared.

Needs no torch. How they are shared is in `from_statistics`.
"""

from collections.abc import Iterator

from int8cli.planning.output_files import sidecar_bytes
from int8cli.planning.survey import Survey
from int8cli.records.conversion import budget_bytes


def spread_counts(survey: Survey, share: float) -> dict[str, int]:
    """The number of columns of each quantized tensor if a budget is spread evenly, by tensor.

    `share` is that of the output's bytes. Together they take as much as the budget, and at most one column more.
    """
    left = budget_bytes(share, survey.output_bytes)
    counts = {each.spec.name: 0 for each in survey.plan.quantized}
    for name, cost in _in_turn(survey):
        if left <= 0:
            break
        counts[name] += 1
        left -= cost
    return counts


def _in_turn(survey: Survey) -> Iterator[tuple[str, int]]:
    """The tensors and the bytes of one of their columns: the first column of each, then the second, and so on."""
    quantized = survey.plan.quantized
    costs = {each.spec.name: sidecar_bytes(each, 1) for each in quantized}
    for place in range(max((each.computed_shape[1] for each in quantized), default=0)):
        yield from ((each.spec.name, costs[each.spec.name]) for each in quantized if place < each.computed_shape[1])
