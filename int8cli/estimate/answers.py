"""A memory estimate with the cards that hold it: what the command answers. Prints nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from int8cli.estimate.cards import SHOWN_CARDS, Card, card_named, cards_of_this_machine
from int8cli.estimate.estimate import PRECISIONS, Estimate, Use
from int8cli.estimate.fit import Answer, FitRow, answer, fit_table
from int8cli.estimate.ways import Way


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """An estimate, the use that was asked about, and what the cards say to it.

    `table` has kinds of cards with counts, `ways` what a conversion takes here. `machine` is for the cards of this
    machine and `answers` for those that were named, one a precision; empty where there are none.
    """

    estimate: Estimate
    use: Use
    table: tuple[FitRow, ...]
    ways: tuple[Way, ...]
    machine: tuple[Answer, ...] = ()
    answers: tuple[Answer, ...] = ()


def memory_report(estimate: Estimate, use: Use, cards: Sequence[Card], ways: tuple[Way, ...]) -> MemoryReport:
    """Asks this machine for its cards, and places the model on them, on `cards` and on the usual kinds."""
    here = cards_of_this_machine()
    return MemoryReport(
        estimate,
        use,
        fit_table(estimate, use, [card_named(name) for name in SHOWN_CARDS]),
        ways,
        tuple(answer(estimate, use, here, precision) for precision in PRECISIONS) if here else (),
        tuple(answer(estimate, use, cards, precision) for precision in PRECISIONS) if cards else (),
    )
