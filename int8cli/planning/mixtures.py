"""How much of a mixture of experts each layout holds in int8.

Owns the comparison of layouts, and the sentence about experts that stay floats. Reads no weights: each layout's plan is
made from the same headers.
"""

import re
from dataclasses import dataclass

from int8cli.planning.decisions import Decision
from int8cli.planning.layouts import LAYOUTS
from int8cli.planning.survey import Survey
from int8cli.results.units import human_bytes

_EXPERTS = re.compile(r"(?:^|\.)experts\.|\.block_sparse_moe\.(?:in|out)put_linear\.")


@dataclass(frozen=True, slots=True)
class LayoutShare:
    """What a layout does with a mixture: the percent of parameters in int8, and of experts in floats; its size."""

    layout: str
    percent_int8: float
    percent_float_experts: float
    output_bytes: int


def layout_shares(survey: Survey) -> tuple[LayoutShare, ...]:
    """The share of each layout, that of the survey first; empty if the model has no experts."""
    if not any(_is_expert(decision) for decision in survey.plan.decisions):
        return ()
    others = (survey.in_layout(layout) for name, layout in LAYOUTS.items() if name != survey.target.NAME)
    return tuple(map(_share, (survey, *others)))


def about_experts(shares: tuple[LayoutShare, ...]) -> str | None:
    """A sentence if experts stay floats in the first of these layouts, with the layout that does better."""
    if not shares or not shares[0].percent_float_experts:
        return None
    here, best = shares[0], max(shares, key=lambda share: share.percent_int8)
    said = (
        f"{here.percent_float_experts:.1f} % of the parameters are experts, which this layout leaves in floats: "
        f"{here.percent_int8:.1f} % become int8"
    )
    if best.percent_int8 <= here.percent_int8:
        return f"{said}. No other layout does better."
    better = f"{best.percent_int8:.1f} %, {human_bytes(best.output_bytes)}"
    return f"{said}. The {best.layout} layout, for vLLM and load_model: {better}."


def _share(survey: Survey) -> LayoutShare:
    plan = survey.plan
    floats = sum(decision.spec.numel for decision in plan.copied if _is_expert(decision))
    return LayoutShare(
        survey.target.NAME,
        plan.percent_quantized,
        100.0 * floats / plan.parameters if plan.parameters else 0.0,
        survey.output_bytes,
    )


def _is_expert(decision: Decision) -> bool:
    return len(decision.spec.shape) >= 2 and _EXPERTS.search(decision.spec.name) is not None
