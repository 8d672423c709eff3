"""Dimensions of the residual stream that may carry outliers, as far as weights can tell: suspects, never outliers.

Owns the one predictor that was found to be worth something, and the precision that was measured for it. One pass over
the shards, in blocks, without any model code; `residual_stream` knows the tensors that it needs by their names.

Predictor, for dimension j of a norm's output: |gain_j| times what the layers before it write into the dimension,
sqrt( mean_v E[v, j]² + Σ ||row_j||² ) over the attention outputs and second feed-forward layers upstream, with E the
token embedding; divided by the root mean square over the dimensions, since the norm divides by it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from int8cli.checkpoint.serialize import serialize
from int8cli.checkpoint.source import LocalFile, Source
from int8cli.checkpoint.tensor import ShardContents
from int8cli.checkpoint.torch_tensors import CheckpointTensors, ShardTensors
from int8cli.checkpoint.writer import write_file
from int8cli.errors import WeightsTellNothingError
from int8cli.model.saved_states import read_back
from int8cli.outliers.residual_stream import ResidualStream, in_block
from int8cli.planning.blocks import BLOCK_ELEMENTS
from int8cli.planning.survey import Survey
from int8cli.workers.torch_threads import torch_threads

# On SmolLM2-135M-Instruct, whose outliers are known from its activations (scripts/measure_outliers.py): the one feature
# comes first of the ranking, and over the norms that have outliers the average precision has this mean.
MEASURED_AVERAGE_PRECISION = 0.76
MEASURED_ON = "SmolLM2-135M-Instruct"
MOST_SUSPECTS = 20
MEASURED_PRECISION_OF_ALL = 1 / MOST_SUSPECTS


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


class SuspectScan:
    """The suspects by what has been seen of a checkpoint so far: a figure by dimension for each tensor of interest."""

    def __init__(self, stream: ResidualStream, on_block: Callable[[], None] = lambda: None) -> None:
        """`on_block` is called after each block that is read."""
        self._stream, self._on_block = stream, on_block
        self._figures: dict[str, Tensor] = {}

    def figure(self, name: str, tensors: CheckpointTensors | ShardTensors) -> Tensor:
        """A norm's gain, the embedding's mean square, a writing layer's squared row norms: float64 (width,)."""
        decision, width = self._stream.tensors[name], self._stream.width
        if len(decision.spec.shape) == 1:
            return tensors.read(name).double() + (1.0 if self._stream.gain_plus_one else 0.0)
        blocks, rows = self._told(tensors.row_blocks(name, BLOCK_ELEMENTS)), decision.spec.shape[0]
        if in_block(decision.module) is None:
            return _column_squares(blocks, width) / max(1, rows)
        # Of a Conv1D weight, (in, out), what is written into a dimension is a column.
        return _column_squares(blocks, width) if decision.transpose else _row_squares(blocks)

    def look_at(self, contents: ShardContents, local: LocalFile) -> dict[str, Tensor]:
        """The figures of a shard that is on this machine, in pieces of a few megabytes."""
        names = [stored.spec.name for stored in contents.tensors if stored.spec.name in self._stream.tensors]
        if not names:
            return {}
        with closing(ShardTensors(local.path, contents)) as tensors, torch_threads(1):
            return {name: self.figure(name, tensors) for name in names}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        self._figures.update(figures)

    def sites(self) -> tuple[SuspectSite, ...]:
        """Each norm's prediction."""
        stacks: dict[str, dict[int, _Layer]] = {}
        embedding: Tensor | None = None
        for name, decision in self._stream.tensors.items():  # in the checkpoint's order, whichever was seen first
            figure, place = self._figures.get(name), in_block(decision.module)
            if figure is None:
                continue
            if place is None:
                embedding = figure
                continue
            layer = stacks.setdefault(place.stack, {}).setdefault(place.index, _Layer())
            (layer.gains if len(decision.spec.shape) == 1 else layer.writes)[place.inner] = figure
        return tuple(_score(stacks, embedding, self._stream.width))

    def suspects(self, most: int) -> tuple[tuple[int, float], ...]:
        """The most suspect dimensions and their scores, sorted by dimension; none before a norm was seen."""
        sites = self.sites()
        found = _rank(sites, most) if sites else ()
        return tuple(sorted((suspect.dimension, suspect.score) for suspect in found))

    def _told(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        for block in blocks:
            yield block
            self._on_block()


def keep_figures(figures: Mapping[str, Tensor], path: Path) -> None:
    """Write a scan's figures down, whole or not at all, in a directory of ours. Raises OutputError."""
    write_file(path, serialize(figures), below=path.parent.parent)


def recall_figures(path: Path) -> dict[str, Tensor] | None:
    """The figures that were written down; None where there are none. Raises SavedStateError for what is unreadable."""
    if not os.path.lexists(path):
        return None
    with read_back(path):
        return load_file(path)


def find_suspects(
    source: Source,
    survey: Survey,
    *,
    most: int = MOST_SUSPECTS,
    on_tensor: Callable[[str, int], None] = lambda name, size: None,
) -> WeightSuspects:
    """Rank the dimensions of a checkpoint's residual stream; at most `most` suspects.

    Reads each tensor of interest once, in pieces of a few megabytes. `on_tensor(name, bytes)` is called after each.
    Raises WeightsTellNothingError where no norms or no layers that write to the residual stream are recognised.
    """
    stream = ResidualStream.of(survey)
    scan = SuspectScan(stream)
    with CheckpointTensors(source, survey.shards) as tensors, torch_threads(1):
        tensors.expect(stream.tensors)
        for name, decision in stream.tensors.items():
            scan.add({name: scan.figure(name, tensors)})
            tensors.release([name])
            on_tensor(name, decision.spec.nbytes)
    sites = scan.sites()
    if not sites:
        raise WeightsTellNothingError(
            "no norms, or no layers that write into the residual stream, are recognised by their names",
            hint="Running the model may tell (pip install 'int8cli[calibrate]').",
        )
    return WeightSuspects(survey.identity.name, survey.identity.revision, sites, _rank(sites, most))


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


def _column_squares(blocks: Iterable[Tensor], width: int) -> Tensor:
    """Squared length of each column: float64 (width,)."""
    total = torch.zeros(width, dtype=torch.float64)
    for squares in _squares(blocks):
        total += squares.sum(dim=0)
    return total


def _row_squares(blocks: Iterable[Tensor]) -> Tensor:
    """Squared length of each row: float64 (rows,)."""
    return torch.cat([squares.sum(dim=1).double() for squares in _squares(blocks)])


def _squares(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The blocks' values squared in float32, in one buffer that stays in cache."""
    buffer: Tensor | None = None
    for block in blocks:
        if buffer is None:
            buffer = torch.empty(block.shape, dtype=torch.float32)
        yield buffer[: block.shape[0]].copy_(block).square_()
