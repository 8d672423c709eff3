"""Which cards hold a model: how many of each kind, and what given cards hold, block by block.

Owns the questions that are asked of a memory estimate and of cards together. Prints nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from int8cli.estimate.cards import Card, Placement, cards_needed, place
from int8cli.estimate.estimate import PRECISIONS, Estimate, Use


@dataclass(frozen=True, slots=True)
class Count:
    """How many cards of a kind hold the weights, and how many the weights in use; None where one block is too large.

    `in_use` is None also where the cache is not known.
    """

    weights: int | None
    in_use: int | None


@dataclass(frozen=True, slots=True)
class FitRow:
    """A kind of card, with the count for each precision."""

    card: Card
    counts: dict[str, Count]


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether given cards hold the model in one precision.

    `fits`: with everything that the use asks for. `largest_context` is how many tokens of each sequence there is room
    for, 0 where there is none; None where the cache is not known, and `fits` then speaks of the weights alone.
    `placement` is that of the use, else that of the largest context, else that of the weights.
    """

    precision: str
    fits: bool
    holds_weights: bool
    largest_context: int | None
    placement: Placement


def fit_table(estimate: Estimate, use: Use, cards: Sequence[Card]) -> tuple[FitRow, ...]:
    """How many of each card it takes, placing whole units in order."""
    known = estimate.cache.layers is not None
    idle = {precision: estimate.loads(precision, None) for precision in PRECISIONS}
    busy = {precision: estimate.loads(precision, use) for precision in PRECISIONS} if known else {}
    return tuple(
        FitRow(
            card,
            {
                precision: Count(
                    cards_needed(idle[precision], card),
                    cards_needed(busy[precision], card) if precision in busy else None,
                )
                for precision in PRECISIONS
            },
        )
        for card in cards
    )


def answer(estimate: Estimate, use: Use, cards: Sequence[Card], precision: str) -> Answer:
    """Place the model on these cards, in their order."""
    weights = place(estimate.loads(precision, None), cards)
    if estimate.cache.layers is None:
        return Answer(precision, weights.fits, weights.fits, None, weights)
    in_use = place(estimate.loads(precision, use), cards)
    largest = _largest_context(estimate, use, cards, precision)
    if not in_use.fits:
        shorter = replace(use, context=largest)
        shown = place(estimate.loads(precision, shorter), cards) if largest else weights
        return Answer(precision, False, weights.fits, largest, shown)
    return Answer(precision, True, True, largest, in_use)


def _largest_context(estimate: Estimate, use: Use, cards: Sequence[Card], precision: str) -> int:
    """The longest context up to the model's own, or the one asked for, that these cards hold; 0 where none."""
    least, most = 0, max(use.context, estimate.cache.own_context or 0)
    while least < most:
        middle = (least + most + 1) // 2
        if place(estimate.loads(precision, replace(use, context=middle)), cards).fits:
            least = middle
        else:
            most = middle - 1
    return least
