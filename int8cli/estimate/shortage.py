"""What would do where given cards do not hold a model: more of them, or weights in RAM or on disk.

Owns the bandwidths that bound offloading. Places nothing itself.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from int8cli.estimate.cards import Card, cards_needed
from int8cli.estimate.estimate import INT8, Estimate, Use
from int8cli.estimate.fit import Answer

# What a token waits for: every weight that is not on a card is read once for each. Theoretical rates of common parts:
# PCIe 4.0 x16, and an NVMe disk on PCIe 3.0 x4.
RAM_TO_CARD_BYTES_A_SECOND = 25e9
DISK_TO_CARD_BYTES_A_SECOND = 3e9


@dataclass(frozen=True, slots=True)
class Shortage:
    """What is missing in int8, and what would do.

    `cards_needed` of the same kind hold the model in use, None where a block is too large for one or the cards differ.
    `offloaded_bytes` of weights are not on a card; the two rates are tokens a second if they were read for each token
    from RAM or from a disk, as the bandwidth allows at best. `ram_bytes` is what this machine has to give.
    """

    card: str
    cards_needed: int | None
    offloaded_bytes: int
    ram_tokens_a_second: float
    disk_tokens_a_second: float
    ram_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def shortage(
    estimate: Estimate, use: Use, cards: Sequence[Card], in_int8: Answer, ram_bytes: int | None
) -> Shortage | None:
    """None where the cards hold the model in int8 with all that the use asks for."""
    if in_int8.fits or not cards:
        return None
    known = estimate.cache.layers is not None
    alike = len(set(cards)) == 1
    needed = cards_needed(estimate.loads(INT8, use if known else None), cards[0]) if alike else None
    offloaded = sum(load.weight_bytes for load in in_int8.placement.without)
    return Shortage(
        cards[0].name,
        needed,
        offloaded,
        RAM_TO_CARD_BYTES_A_SECOND / offloaded if offloaded else 0.0,
        DISK_TO_CARD_BYTES_A_SECOND / offloaded if offloaded else 0.0,
        ram_bytes,
    )
