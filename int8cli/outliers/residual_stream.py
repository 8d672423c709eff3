"""Which tensors of a checkpoint determine its residual stream, by their names and shapes alone.

Owns the names of the norms that read from the stream, of the layers that write to it, and of the embedding at its
start. Reads no values, and needs no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from int8cli.checkpoint.tensor import ShardContents
from int8cli.planning.decisions import Decision
from int8cli.planning.survey import Survey

_WRITER = re.compile(
    r"\.(o_proj|out_proj|c_proj|wo|o|dense_4h_to_h|down_proj|fc2|fc_out|w2|out_lin|lin2|attn_out|ff_out"
    r"|self_attention\.dense|attention\.dense|attention\.output\.dense|output\.dense|attention\.out_proj)$"
)
_NORM = re.compile(r"(norm|ln)(_?\w*)?$", re.IGNORECASE)
_INNER_NORM = re.compile(r"[qk]_(layer)?norm$|post_(feedforward|mlp)_(layer)?norm$|sub_?(layer)?norm$", re.IGNORECASE)
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared|embed)$")
_IN_BLOCK = re.compile(r"^(.*?)\.(\d+)\.(.*)$")
_GAIN_PLUS_ONE = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma", "nemotron"})


@dataclass(frozen=True, slots=True)
class InBlock:
    """The place of a module in a block: `model.layers`, 11, `self_attn.o_proj`."""

    stack: str
    index: int
    inner: str


@dataclass(frozen=True, slots=True)
class ResidualStream:
    """The tensors that determine a stream of `width` dimensions, in the checkpoint's order. Picklable.

    `width` is 0 if no norms are recognised. With `gain_plus_one`, a norm multiplies by 1 + its weight.
    """

    width: int
    gain_plus_one: bool
    tensors: Mapping[str, Decision]

    @classmethod
    def of(cls, survey: Survey) -> "ResidualStream":
        width = _width(survey)
        wanted = {each.spec.name: each for each in survey.plan.decisions if _determines_stream(each, width)}
        return cls(width, survey.config.get("model_type") in _GAIN_PLUS_ONE, wanted)

    def within(self, contents: ShardContents) -> "ResidualStream":
        """Only the tensors that are in one shard."""
        names = (stored.spec.name for stored in contents.tensors)
        return replace(self, tensors={name: self.tensors[name] for name in names if name in self.tensors})

    def feeds(self, decision: Decision) -> bool:
        """Whether a linear is in a block and reads the stream through a norm."""
        shape = decision.spec.shape
        in_features = shape[0] if decision.transpose else shape[-1]
        return (
            in_features == self.width and in_block(decision.module) is not None and not _WRITER.search(decision.module)
        )


def in_block(module: str) -> InBlock | None:
    """The place of a module in its block; None for a module outside the blocks."""
    found = _IN_BLOCK.match(module)
    return InBlock(found.group(1), int(found.group(2)), found.group(3)) if found is not None else None


def _width(survey: Survey) -> int:
    """The most common length of a norm's weight in a block."""
    widths = [
        decision.spec.numel
        for decision in survey.plan.decisions
        if len(decision.spec.shape) == 1 and _IN_BLOCK.match(decision.module) and _NORM.search(decision.module)
    ]
    return max(sorted(set(widths)), key=widths.count) if widths else 0


def _determines_stream(decision: Decision, width: int) -> bool:
    """Whether a tensor is an embedding, a norm of the stream, or the weight of a layer that writes to it."""
    spec, module = decision.spec, decision.module
    if not spec.name.endswith(".weight") or width not in spec.shape:
        return False
    if _IN_BLOCK.match(module) is None:
        return len(spec.shape) == 2 and spec.shape[1] == width and bool(_EMBEDDING.search(module))
    if len(spec.shape) == 1:
        return bool(_NORM.search(module)) and not _INNER_NORM.search(module)
    rows = spec.shape[1] if decision.transpose else spec.shape[0]
    return len(spec.shape) == 2 and rows == width and bool(_WRITER.search(module))
