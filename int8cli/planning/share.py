"""Which shards of a checkpoint one of several processes converts.

Owns the division. It depends on the sizes of all shards and on nothing else, so every machine makes the same one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heapify, heapreplace


@dataclass(frozen=True, slots=True)
class Share:
    """Part `part` of `parts`, from 1 on."""

    part: int
    parts: int

    def __str__(self) -> str:
        return f"part {self.part} of {self.parts}"

    def of(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """The names in this part, in their order. `sizes`: name → bytes.

        The largest shards are dealt first, each to the part with the fewest bytes so far. Shards of one size are dealt
        in turn: where the first shards are needed to convert the later ones, every part has some of them.
        """
        order = {name: place for place, name in enumerate(sizes)}
        loads = [(0, part) for part in range(min(self.parts, len(sizes)))]  # any part beyond these gets nothing
        heapify(loads)
        mine = []
        for name in sorted(sizes, key=lambda name: (-sizes[name], order[name])):
            load, least = loads[0]
            heapreplace(loads, (load + sizes[name], least))
            if least == self.part - 1:
                mine.append(name)
        return tuple(sorted(mine, key=order.__getitem__))


@dataclass(frozen=True, slots=True)
class PlannedShare:
    """What a share has to do: the source files in it, their bytes, and those of what they become with sidecars."""

    share: Share
    shards: tuple[str, ...]
    source_bytes: int
    output_bytes: int
