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


def _below(name: str, block: str) -> str:
    """The name inside its block, with `*` for the numbers of experts and sublayers."""
    below = name.partition(block)[2] or name
    return ".".join("*" if part.isdigit() else part for part in below.split("."))
