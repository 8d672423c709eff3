"""A memory estimate, and which cards are large enough: the result of the command."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from int8cli.estimate.cards import SHOWN_CARDS, Card, card_named, cards_of_this_machine
from int8cli.estimate.estimate import INT8, PRECISIONS, Estimate, Use
from int8cli.estimate.fit import Answer, FitRow, answer, fit_table
from int8cli.estimate.machines import OnMachines
from int8cli.estimate.shortage import Shortage, shortage
from int8cli.estimate.ways import Way


@dataclass(frozen=True, slots=True)
class MachineAnswer:
    """Whether one machine's cards hold the model: an answer a precision, and what would do where int8 does not fit."""

    name: str
    answers: tuple[Answer, ...]
    shortage: Shortage | None


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """An estimate for a given use, and whether the model fits on cards.

    `table` has kinds of cards with counts, `ways` what a conversion takes here, and `on_machines` on
    several like this one. `here` is for the cards of this machine
    and `asked` for the machines that were named, in their order.
    """

    estimate: Estimate
    use: Use
    table: tuple[FitRow, ...]
    ways: tuple[Way, ...]
    here: MachineAnswer | None = None
    asked: tuple[MachineAnswer, ...] = ()
    on_machines: tuple[OnMachines, ...] = ()

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Those of all machines that were named."""
        return tuple(each for machine in self.asked for each in machine.answers)


def memory_report(
    estimate: Estimate,
    use: Use,
    machines: Mapping[str, Sequence[Card]],
    ways: tuple[Way, ...],
    ram_bytes: int | None,
) -> MemoryReport:
    """Asks this machine for its cards, and places the model on them, on those of each machine and on the usual kinds.

    `ram_bytes` is what this machine has to give.
    """
    here = cards_of_this_machine()

    def asked(name: str, cards: Sequence[Card]) -> MachineAnswer:
        by_precision = {precision: answer(estimate, use, cards, precision) for precision in PRECISIONS}
        missing = shortage(estimate, use, cards, by_precision[INT8], ram_bytes)
        return MachineAnswer(name, tuple(by_precision.values()), missing)

    return MemoryReport(
        estimate,
        use,
        fit_table(estimate, use, [card_named(name) for name in SHOWN_CARDS]),
        ways,
        asked("this machine", here) if here else None,
        tuple(asked(name, cards) for name, cards in machines.items()),
    )
