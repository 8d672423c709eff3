"""A memory estimate, and which cards are large enough: the result of the command."""

from collections.abc import Sequence
from dataclasses import dataclass

from int8cli.estimate.cards import SHOWN_CARDS, Card, card_named, cards_of_this_machine
from int8cli.estimate.estimate import PRECISIONS, Estimate, Use
from int8cli.estimate.fit import Answer, FitRow, answer, fit_table


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """An estimate for a given use, and whether the model fits on cards.

    `table` shows how many cards of each common kind are needed. `machine` is about the cards of this machine, and
    `answers` about the cards that the user named. Both have one answer per precision, or are empty without cards.
    """

    estimate: Estimate
    use: Use
    table: tuple[FitRow, ...]
    machine: tuple[Answer, ...] = ()
    answers: tuple[Answer, ...] = ()


def memory_report(estimate: Estimate, use: Use, cards: Sequence[Card]) -> MemoryReport:
    """Place the model on the cards of this machine, on `cards`, and on the common kinds."""
    here = cards_of_this_machine()
    return MemoryReport(
        estimate,
        use,
        fit_table(estimate, use, [card_named(name) for name in SHOWN_CARDS]),
        tuple(answer(estimate, use, here, precision) for precision in PRECISIONS) if here else (),
        tuple(answer(estimate, use, cards, precision) for precision in PRECISIONS) if cards else (),
    )
