"""Which part of a model a tensor belongs to (embeddings, a block, the head), and the order in which the parts run.

Owns how tensor names reveal the structure of a model. Uses names and the reasons in the plan, but no sizes. A unit is
something that a loader never splits over cards: one block, the embeddings, or the head.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from int8cli.planning import reasons as why
from int8cli.planning.decisions import Decision

EMBEDDINGS = "embeddings"
BLOCKS = "blocks"
ENCODER = "encoder"
DECODER = "decoder"
TOWER = "vision and audio"
EXPERTS = "experts"
HEAD = "head"
OTHER = "other"
PARTS = (EMBEDDINGS, TOWER, ENCODER, BLOCKS, DECODER, EXPERTS, OTHER, HEAD)  # in running order

# The names of lists of blocks: `h`, `model.layers`, `encoder.block`, `vision_model.encoder.layers`.
_BLOCK_LIST = re.compile(r"(?:^|_)(?:h|layers?|blocks?|resblocks|stages|layer_groups)$")
_TOWER = re.compile(r"vision|visual|image|audio|speech|acoustic")
_EXPERT = re.compile(r"\.experts(?:\.|$)")
_EMBEDDING = re.compile(r"(?:^|\.)(?:\w*embed\w*|\w*_emb|wte|wpe|shared)(?:\.|$|_)")
_HEAD = re.compile(
    r"^(?:\w+\.)?(?:lm_head|embed_out|cls|score|classifier|qa_outputs|proj_out|final_logits_bias)(?:\.|$)"
)


@dataclass(frozen=True, slots=True)
class MemoryUnit:
    """A part of a model that is placed on one card as a whole. `index` is the number of a block in its stack."""

    name: str
    part: str
    stack: str = ""
    index: int | None = None
    decisions: list[Decision] = field(default_factory=list, compare=False)

    @property
    def is_block(self) -> bool:
        return self.index is not None


def units_of(decisions: Iterable[Decision]) -> tuple[MemoryUnit, ...]:
    """The units of a model in the order in which they run: embeddings, blocks, final norms, head."""
    decisions = tuple(decisions)
    stacks = {stack for decision in decisions if (stack := _stack(decision.spec.name))}
    both = any(_is_encoder(stack) for stack in stacks) and any("decoder" in stack.lower() for stack in stacks)
    units: dict[str, MemoryUnit] = {}
    for decision in decisions:
        unit = _unit(decision, both=both)
        units.setdefault(unit.name, unit).decisions.append(decision)
    return tuple(sorted(units.values(), key=_running_order))


def part_of(decision: Decision, unit: MemoryUnit) -> str:
    """The part that a tensor is shown under. Experts are shown separately from the rest of their blocks."""
    return EXPERTS if unit.is_block and _EXPERT.search(decision.module) else unit.part


def cached_units(units: Iterable[MemoryUnit], layers: int) -> Iterator[tuple[str, int]]:
    """For each of the `layers` in a config, the unit that contains it, as (unit name, layer).

    The layers are the blocks of the longest stack, or of a decoder if there is one. Blocks beyond the config's number
    of layers (multi-token prediction) have no cache. If there are fewer blocks, each is used several times (ALBERT).
    """
    last = last_stack(units)
    for layer in range(layers) if last else ():
        yield last[layer if layers <= len(last) else layer * len(last) // layers].name, layer


def last_stack(units: Iterable[MemoryUnit]) -> list[MemoryUnit]:
    """The blocks of the longest stack of the last part that has any, in their order; empty without blocks."""
    stacks: dict[str, list[MemoryUnit]] = {}
    for unit in units:
        if unit.is_block:
            stacks.setdefault(unit.stack, []).append(unit)
    return max(stacks.values(), key=lambda blocks: (_rank(blocks[0].part), len(blocks)), default=[])


def _unit(decision: Decision, *, both: bool) -> MemoryUnit:
    name = decision.spec.name
    stack = _stack(name)
    if stack:
        index = name[len(stack) + 1 :].partition(".")[0]
        return MemoryUnit(f"{stack}.{index}", _part_of_stack(stack, both=both), stack, int(index))
    if decision.reason in (why.HEAD, why.TIED_HEAD) or _HEAD.search(name):
        return MemoryUnit(HEAD, HEAD)
    if decision.reason == why.EMBEDDING or _EMBEDDING.search(name):
        return MemoryUnit(EMBEDDINGS, EMBEDDINGS)
    return MemoryUnit(OTHER, OTHER)


def _part_of_stack(stack: str, *, both: bool) -> str:
    if _TOWER.search(stack):
        return TOWER
    if not both:
        return BLOCKS
    return ENCODER if _is_encoder(stack) else DECODER


def _is_encoder(stack: str) -> bool:
    return "encoder" in stack.lower() and "decoder" not in stack.lower()


def _stack(name: str) -> str:
    """The name of the outermost list of blocks that contains a tensor; empty if there is none."""
    parts = name.split(".")
    for place in range(1, len(parts)):
        if parts[place].isdigit() and _BLOCK_LIST.search(parts[place - 1]):
            return ".".join(parts[:place])
    return ""


def _rank(part: str) -> int:
    return PARTS.index(part)


def _running_order(unit: MemoryUnit) -> tuple[int, str, int]:
    return _rank(unit.part), unit.stack, unit.index or 0
