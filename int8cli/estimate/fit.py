"""Whether a model fits: how many cards of each kind it needs, and whether given cards are enough, block by block.

Owns everything that combines a memory estimate with cards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from int8cli.estimate.cards import Card, Placement, cards_needed, place
from int8cli.estimate.estimate import PRECISIONS, Estimate, Use


@dataclass(frozen=True, slots=True)
class Count:
    """How many cards of a kind are needed for the weights alone, and in use. None if one block is too large.

    `in_use` is also None if the cache size is unknown.
    """

    weights: int | None
    in_use: int | None


@dataclass(frozen=True, slots=True)
class FitRow:
    """A kind of card, and how many are needed at each precision."""

    card: Card
    counts: dict[str, Count]


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether the model fits on given cards at one precision.

    `fits` means that everything fits, including the context. `largest_context` is the most tokens per sequence that
    fit, or 0; it is None if the cache size is unknown, and then `fits` is about the weights alone. `placement` is for
    the requested use if that fits, otherwise for the largest context, otherwise for the weights alone.
    """

    precision: str
    fits: bool
    holds_weights: bool
    largest_context: int | None
    placement: Placement


def fit_table(estimate: Estimate, use: Use, cards: Sequence[Card]) -> tuple[FitRow, ...]:
    """How many cards of each kind are needed if whole units are placed in order."""
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
    """The longest context that fits on these cards, up to the model's own or the requested one; 0 if none fits."""
    least, most = 0, max(use.context, estimate.cache.own_context or 0)
    while least < most:
        middle = (least + most + 1) // 2
        if place(estimate.loads(precision, replace(use, context=middle)), cards).fits:
            least = middle
        else:
            most = middle - 1
    return least
