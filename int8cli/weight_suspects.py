"""Dimensions of the residual stream that may carry outliers, as far as weights can tell: suspects, never outliers.

Owns the one predictor that was found to be worth something, the names by which it finds the layers it needs, and the
precision that was measured for it. One pass over the shards, in blocks, without any model code.

Predictor, for dimension j of a norm's output: |gain_j| times what the layers before it write into the dimension,
sqrt( mean_v E[v, j]² + Σ ||row_j||² ) over the attention outputs and second feed-forward layers upstream, with E the
token embedding; divided by the root mean square over the dimensions, since the norm divides by it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from int8cli.calibration.tensors import CheckpointTensors
from int8cli.checkpoint.source import Source
from int8cli.errors import UnsupportedModelError
from int8cli.plan import Decision
from int8cli.survey import Survey

# On SmolLM2-135M-Instruct, whose outliers are known from its activations (scripts/measure_outliers.py): the one feature
# comes first of the ranking, and over the norms that have outliers the average precision has this mean.
MEASURED_AVERAGE_PRECISION = 0.76
MEASURED_ON = "SmolLM2-135M-Instruct"
MOST_SUSPECTS = 20
MEASURED_PRECISION_OF_ALL = 1 / MOST_SUSPECTS

_ROWS_BYTES = 8 << 20
_WRITER = re.compile(
    r"\.(o_proj|out_proj|c_proj|wo|o|dense_4h_to_h|down_proj|fc2|fc_out|w2|out_lin|lin2|attn_out|ff_out"
    r"|self_attention\.dense|attention\.dense|attention\.output\.dense|output\.dense|attention\.out_proj)$"
)
_NORM = re.compile(r"(norm|ln)(_?\w*)?$", re.IGNORECASE)
_INNER_NORM = re.compile(r"[qk]_(layer)?norm$|post_(feedforward|mlp)_(layer)?norm$|sub_?(layer)?norm$", re.IGNORECASE)
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared|embed)$")
_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.*)$")
_GAIN_PLUS_ONE = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma", "nemotron"})


@dataclass(frozen=True, slots=True)
class SuspectSite:
    """The output of one norm, with the predicted magnitude of each dimension relative to the rest: float32 (width,)."""

    name: str
    stack: str
    layer: int
    score: Tensor


@dataclass(frozen=True, slots=True)
class Suspect:
    """A dimension, its score (mean over the norms), and the layers in which it is among the first ones."""

    dimension: int
    score: float
    layers: tuple[int, ...]
    layer_count: int


@dataclass(frozen=True, slots=True)
class WeightSuspects:
    """What the weights of a model make suspect, most suspect first; the scores of all norms for the heatmap."""

    model: str
    revision: str | None
    sites: tuple[SuspectSite, ...]
    suspects: tuple[Suspect, ...]


@dataclass(slots=True)
class _Layer:
    """What one block contributes: gains by norm, and the squared row norms of what it writes."""

    gains: dict[str, Tensor] = field(default_factory=dict)
    writes: dict[str, Tensor] = field(default_factory=dict)


def find_suspects(
    source: Source,
    survey: Survey,
    *,
    most: int = MOST_SUSPECTS,
    on_tensor: Callable[[str, int], None] = lambda name, size: None,
) -> WeightSuspects:
    """Rank the dimensions of a checkpoint's residual stream; at most `most` suspects.

    Reads each tensor of interest once, in pieces of a few megabytes. `on_tensor(name, bytes)` is called after each.
    Raises UnsupportedModelError where no norms or no layers that write to the residual stream are recognised.
    """
    stacks: dict[str, dict[int, _Layer]] = {}
    embedding: Tensor | None = None
    width = _hidden_size(survey)
    add_one = survey.config.get("model_type") in _GAIN_PLUS_ONE
    with CheckpointTensors(source, survey.layouts) as tensors:
        wanted = [decision for decision in survey.plan.decisions if _is_wanted(decision, width)]
        tensors.expect(decision.spec.name for decision in wanted)
        for decision in wanted:
            name, place = decision.spec.name, _LAYER.match(decision.module)
            tensor = tensors.map(name)
            if place is None:
                embedding = _mean_square_columns(tensor)
            else:
                stack, index, inner = place.group(1), int(place.group(2)), place.group(3)
                layer = stacks.setdefault(stack, {}).setdefault(index, _Layer())
                if tensor.dim() == 1:
                    layer.gains[inner] = tensor.float() + (1.0 if add_one else 0.0)
                else:
                    layer.writes[inner] = _row_squares(tensor, transpose=decision.transpose)
            del tensor
            tensors.release([name])
            on_tensor(name, decision.spec.nbytes)
    sites = tuple(_score(stacks, embedding, width))
    if not sites:
        raise UnsupportedModelError(
            "no norms, or no layers that write into the residual stream, are recognised by their names",
            hint="--from activations tells by running the model (pip install 'int8cli[calibrate]').",
        )
    return WeightSuspects(survey.identity.name, survey.identity.revision, sites, _rank(sites, most))


def _hidden_size(survey: Survey) -> int:
    """The commonest length of a norm's weight inside a block."""
    widths = [
        decision.spec.numel
        for decision in survey.plan.decisions
        if len(decision.spec.shape) == 1 and _LAYER.match(decision.module) and _NORM.search(decision.module)
    ]
    return max(sorted(set(widths)), key=widths.count) if widths else 0


def _is_wanted(decision: Decision, width: int) -> bool:
    spec, module = decision.spec, decision.module
    if not spec.name.endswith(".weight") or width not in spec.shape:
        return False
    if _LAYER.match(module) is None:
        return len(spec.shape) == 2 and spec.shape[1] == width and bool(_EMBEDDING.search(module))
    if len(spec.shape) == 1:
        return bool(_NORM.search(module)) and not _INNER_NORM.search(module)
    rows = spec.shape[1] if decision.transpose else spec.shape[0]
    return len(spec.shape) == 2 and rows == width and bool(_WRITER.search(module))


def _score(stacks: Mapping[str, Mapping[int, _Layer]], embedding: Tensor | None, width: int) -> Iterator[SuspectSite]:
    """Each norm's prediction, from the layers of its stack before it; one within a block sees all before the block."""
    for stack, layers in stacks.items():
        written = (embedding if embedding is not None else torch.zeros(width)).double()
        for index in sorted(layers):
            layer = layers[index]
            before = written.clone()
            attention, rest = _in_order(layer.writes)
            for place, (name, gain) in enumerate(layer.gains.items()):
                upstream = (before if place == 0 else before + attention).sqrt()
                rms = upstream.square().mean().sqrt().clamp_min(1e-30)
                score = (gain.abs().double() * upstream / rms).float()
                yield SuspectSite(f"{stack}.{index}.{name}", stack, index, score)
            written = before + attention + rest


def _in_order(writes: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Squared row norms written by attention, and by the rest of a block."""
    zero = torch.zeros(1, dtype=torch.float64)
    attention = [value for name, value in writes.items() if "att" in name]
    rest = [value for name, value in writes.items() if "att" not in name]
    return sum(attention, zero), sum(rest, zero)


def _rank(sites: Sequence[SuspectSite], most: int) -> tuple[Suspect, ...]:
    scores = torch.stack([site.score for site in sites])  # (norms, width)
    mean = scores.mean(dim=0)
    first = {site.name: set(site.score.topk(min(most, mean.numel())).indices.tolist()) for site in sites}
    layers = {(site.stack, site.layer) for site in sites}
    return tuple(
        Suspect(
            dimension,
            float(mean[dimension]),
            tuple(sorted({site.layer for site in sites if dimension in first[site.name]})),
            len(layers),
        )
        for dimension in mean.topk(min(most, mean.numel())).indices.tolist()
    )


def _mean_square_columns(table: Tensor) -> Tensor:
    """Mean over rows of the squared values: float64 (columns,)."""
    total = torch.zeros(table.shape[1], dtype=torch.float64)
    for rows in _pieces(table):
        total += rows.float().square_().sum(dim=0).double()
    return total / max(1, table.shape[0])


def _row_squares(weight: Tensor, *, transpose: bool) -> Tensor:
    """Squared length of each row of a weight (out, in): float64 (out,). Of a Conv1D weight, (in, out), the columns."""
    if transpose:
        return _mean_square_columns(weight) * weight.shape[0]
    return torch.cat([rows.float().square_().sum(dim=1).double() for rows in _pieces(weight)])


def _pieces(matrix: Tensor) -> Iterator[Tensor]:
    rows = max(1, _ROWS_BYTES // max(1, matrix.shape[1] * matrix.element_size()))
    for start in range(0, matrix.shape[0], rows):
        yield matrix[start : start + rows]
