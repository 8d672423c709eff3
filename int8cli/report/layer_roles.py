"""The role of a linear layer in its block: `model.layers.7.mlp.up_proj` is the `mlp.up_proj` of block 7.

Owns how layers are grouped into series, with one point per block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from int8cli.results.evaluation import LayerError

OUTSIDE = "outside the blocks, in order"


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """A series, and the position in it. The experts of a block share a position."""

    role: str
    number: int


def places(layers: Sequence[LayerError]) -> list[LayerPlace]:
    """The place of each layer. The stack is named if there are several; layers outside the stacks are numbered."""
    stacks = {layer.stack for layer in layers if layer.stack is not None}
    found: list[LayerPlace] = []
    outside = 0
    for layer in layers:
        if layer.stack is None or layer.layer is None:
            found.append(LayerPlace(OUTSIDE, outside))
            outside += 1
        else:
            role = _below(layer.name, f"{layer.stack}.{layer.layer}.")
            found.append(LayerPlace(f"{layer.stack}: {role}" if len(stacks) > 1 else role, layer.layer))
    return found


def places_by_name(names: Sequence[str]) -> list[LayerPlace]:
    """The place of each layer, from its name alone: the first number in `model.layers.7.mlp.up_proj` is its block."""
    split = [_around_first_number(name) for name in names]
    stacks = {stack for stack, number, _ in split if number is not None}
    found: list[LayerPlace] = []
    outside = 0
    for stack, number, below in split:
        if number is None:
            found.append(LayerPlace(OUTSIDE, outside))
            outside += 1
        else:
            found.append(LayerPlace(f"{stack}: {below}" if len(stacks) > 1 else below, number))
    return found


def _around_first_number(name: str) -> tuple[str, int | None, str]:
    """The part before the number, the number, and the part after it, with `*` for further numbers."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if place is None:
        return "", None, name
    below = ".".join("*" if part.isdigit() else part for part in parts[place + 1 :])
    return ".".join(parts[:place]), int(parts[place]), below or parts[place]


def _below(name: str, block: str) -> str:
    """The name inside its block, with `*` for the numbers of experts and sublayers."""
    below = name.partition(block)[2] or name
    return ".".join("*" if part.isdigit() else part for part in below.split("."))
