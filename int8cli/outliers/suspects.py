"""Dimensions of the residual stream that the weights alone suggest might carry outliers: suspects, never outliers.

Owns the one predictor that proved useful, and its measured precision. It takes one pass over the shards, in blocks,
without model code. `residual_stream` recognises the tensors it needs by name.

The score of dimension j in a norm's output is |gain_j| times what the layers before it write to the dimension,
sqrt( mean_v E[v, j]² + Σ ||row_j||² ), divided by the root mean square of this over the dimensions, because the norm
divides by that. The sum is over the attention outputs and second feed-forward layers upstream; E is the token
embedding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from int8cli.checkpoint.reader import read_small
from int8cli.checkpoint.serialize import serialize
from int8cli.checkpoint.source import LocalFile, Source
from int8cli.checkpoint.tensor import ShardContents
from int8cli.checkpoint.torch_tensors import CheckpointTensors, ShardTensors
from int8cli.checkpoint.writer import write_file
from int8cli.errors import NoSuspectsError
from int8cli.model.saved_states import read_back
from int8cli.outliers.residual_stream import ResidualStream, in_block
from int8cli.planning.blocks import BLOCK_ELEMENTS
from int8cli.planning.survey import Survey
from int8cli.workers.torch_threads import torch_threads

# Measured on SmolLM2-135M-Instruct, whose outliers are known from its activations (scripts/measure_outliers.py). Its
# only outlier feature is ranked first. This is the mean of the average precision over the norms that have outliers.
MEASURED_AVERAGE_PRECISION = 0.76
MEASURED_ON = "SmolLM2-135M-Instruct"
MOST_SUSPECTS = 20
MEASURED_PRECISION_OF_ALL = 1 / MOST_SUSPECTS


@dataclass(frozen=True, slots=True)
class SuspectSite:
    """A norm, with the predicted magnitude of each dimension of its output relative to the rest: float32 (width,)."""

    name: str
    stack: str
    layer: int
    score: Tensor


@dataclass(frozen=True, slots=True)
class Suspect:
    """A dimension, its score (mean over the norms), and the layers in which it is among the top suspects."""

    dimension: int
    score: float
    layers: tuple[int, ...]
    layer_count: int


@dataclass(frozen=True, slots=True)
class WeightSuspects:
    """The suspects of a model, most suspect first, and the scores at all norms for the heatmap."""

    model: str
    revision: str | None
    sites: tuple[SuspectSite, ...]
    suspects: tuple[Suspect, ...]


class SuspectScan:
    """The suspects by the tensors read so far. For each tensor of interest, it stores one figure per dimension."""

    def __init__(self, stream: ResidualStream, on_block: Callable[[], None] = lambda: None) -> None:
        """`on_block` is called after each block has been read."""
        self._stream, self._on_block = stream, on_block
        self._figures: dict[str, Tensor] = {}
        self._embeddings: list[str] = []
        self._stacks: dict[str, _Stack] = {}
        for name, decision in stream.tensors.items():
            place = in_block(decision.module)
            if place is None:
                self._embeddings.append(name)
            else:
                stack = self._stacks.setdefault(place.stack, _Stack(place.stack))
                stack.expect(_InLayer(name, place.index, place.inner, is_gain=len(decision.spec.shape) == 1))

    def figure(self, name: str, tensors: CheckpointTensors | ShardTensors) -> Tensor:
        """A norm's gain, the embedding's mean square, a writing layer's squared row norms: float64 (width,)."""
        decision, width = self._stream.tensors[name], self._stream.width
        if len(decision.spec.shape) == 1:
            return tensors.read(name).double() + (1.0 if self._stream.gain_plus_one else 0.0)
        blocks, rows = self._reported(tensors.row_blocks(name, BLOCK_ELEMENTS)), decision.spec.shape[0]
        if in_block(decision.module) is None:
            return _column_squares(blocks, width) / max(1, rows)
        # A Conv1D weight is (in, out): the weights that write to a dimension are a column.
        return _column_squares(blocks, width) if decision.transpose else _row_squares(blocks)

    def scan(self, contents: ShardContents, local: LocalFile) -> dict[str, Tensor]:
        """The figures of a shard that is on this machine. Reads it in pieces of a few megabytes."""
        names = [stored.spec.name for stored in contents.tensors if stored.spec.name in self._stream.tensors]
        if not names:
            return {}
        with closing(ShardTensors(local.path, contents)) as tensors, torch_threads(1):
            return {name: self.figure(name, tensors) for name in names}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Add figures. Their layers and all layers after them are scored again, but not the layers before them."""
        self._figures.update(figures)
        for name in figures:
            place = in_block(self._stream.tensors[name].module)
            if place is not None:
                self._stacks[place.stack].changed(place.index)
            else:
                for stack in self._stacks.values():
                    stack.changed(-1)

    def sites(self) -> tuple[SuspectSite, ...]:
        """The prediction for each norm, in the checkpoint's order, whatever the order of reading was."""
        seen = [self._figures[name] for name in self._embeddings if name in self._figures]
        embedding = seen[-1].double() if seen else torch.zeros(self._stream.width, dtype=torch.float64)
        return tuple(site for stack in self._stacks.values() for site in stack.sites(self._figures, embedding))

    def suspects(self, most: int) -> tuple[tuple[int, float], ...]:
        """The most suspect dimensions and their scores, sorted by dimension; empty until a norm has been read."""
        sites = self.sites()
        if not sites:
            return ()
        mean = _mean_score(sites)
        return tuple(sorted((dimension, float(mean[dimension])) for dimension in _largest(mean, most)))

    def _reported(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        for block in blocks:
            yield block
            self._on_block()


@dataclass(frozen=True, slots=True)
class _InLayer:
    """A tensor of interest in a block: a norm's gain, or the weight of a layer that writes to the residual stream."""

    name: str
    index: int
    inner: str
    is_gain: bool


@dataclass(frozen=True, slots=True)
class _ScoredLayer:
    """The predictions for a layer's norms, and the sum of what all layers up to it write: float64 (width,)."""

    index: int
    sites: tuple[SuspectSite, ...]
    written: Tensor


class _Stack:
    """The layers of one stack. A layer is scored again only if figures for it or for a layer before it arrive."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tensors: dict[int, list[_InLayer]] = {}
        self._scored: list[_ScoredLayer] = []  # by index
        self._unscored: set[int] = set()

    def expect(self, tensor: _InLayer) -> None:
        """Add a tensor. Call in the checkpoint's order."""
        self._tensors.setdefault(tensor.index, []).append(tensor)

    def changed(self, index: int) -> None:
        """Figures for a layer have arrived. The index of the embedding is -1."""
        while self._scored and self._scored[-1].index >= index:
            self._unscored.add(self._scored.pop().index)
        if index >= 0:
            self._unscored.add(index)

    def sites(self, figures: Mapping[str, Tensor], embedding: Tensor) -> Iterator[SuspectSite]:
        """The predictions for all norms in layers that have figures."""
        for index in sorted(self._unscored):
            written = self._scored[-1].written if self._scored else embedding
            seen = [tensor for tensor in self._tensors[index] if tensor.name in figures]
            self._scored.append(_score(self._name, index, seen, figures, written))
        self._unscored.clear()
        return (site for layer in self._scored for site in layer.sites)


def save_figures(
    figures: Mapping[str, Tensor], path: Path, *, below: Path | None = None, aside: Path | None = None
) -> None:
    """Save the figures of a scan, whole or not at all; `below` and `aside` as in `write_file`. Raises OutputError."""
    write_file(path, serialize(figures), below=below, aside=aside)


def load_figures(path: Path) -> dict[str, Tensor]:
    """The saved figures. Raises SavedStateError if they are missing or damaged."""
    with read_back(path):
        return load(read_small(path))


def find_suspects(
    source: Source,
    survey: Survey,
    *,
    most: int = MOST_SUSPECTS,
    on_tensor: Callable[[str, int], None] = lambda name, size: None,
) -> WeightSuspects:
    """Rank the dimensions of a checkpoint's residual stream. Returns at most `most` suspects.

    Reads each tensor of interest once, in pieces of a few megabytes. `on_tensor(name, bytes)` is called after each.
    Raises NoSuspectsError if no norms, or no layers that write to the residual stream, are recognised.
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
        raise NoSuspectsError(
            "no norms, or no layers that write to the residual stream, are recognised by name",
            hint="Run the model instead (pip install 'int8cli[calibrate]').",
        )
    return WeightSuspects(survey.identity.name, survey.identity.revision, sites, _rank(sites, most))


def _score(
    stack: str, index: int, tensors: Sequence[_InLayer], figures: Mapping[str, Tensor], written: Tensor
) -> _ScoredLayer:
    """Score the norms of a layer. `written` is what the layers before it write.

    The first norm of a block sees only that. A later norm also sees what the attention of the block writes.
    """
    attention, rest = _in_order({each.inner: figures[each.name] for each in tensors if not each.is_gain})
    sites = []
    for place, gain in enumerate(each for each in tensors if each.is_gain):
        upstream = (written if place == 0 else written + attention).sqrt()
        rms = upstream.square().mean().sqrt().clamp_min(1e-30)
        score = (figures[gain.name].abs().double() * upstream / rms).float()
        sites.append(SuspectSite(f"{stack}.{index}.{gain.inner}", stack, index, score))
    return _ScoredLayer(index, tuple(sites), written + attention + rest)


def _in_order(writes: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Squared row norms of what attention writes, and of what the rest of the block writes."""
    zero = torch.zeros(1, dtype=torch.float64)
    attention = [value for name, value in writes.items() if "att" in name]
    rest = [value for name, value in writes.items() if "att" not in name]
    return sum(attention, zero), sum(rest, zero)


def _rank(sites: Sequence[SuspectSite], most: int) -> tuple[Suspect, ...]:
    mean = _mean_score(sites)
    first = {site.name: set(_largest(site.score, most)) for site in sites}
    layers = {(site.stack, site.layer) for site in sites}
    return tuple(
        Suspect(
            dimension,
            float(mean[dimension]),
            tuple(sorted({site.layer for site in sites if dimension in first[site.name]})),
            len(layers),
        )
        for dimension in _largest(mean, most)
    )


def _mean_score(sites: Sequence[SuspectSite]) -> Tensor:
    """By dimension, over the norms: float32 (width,)."""
    return torch.stack([site.score for site in sites]).mean(dim=0)


def _largest(scores: Tensor, most: int) -> list[int]:
    """The dimensions with the largest scores, largest first."""
    return [int(dimension) for dimension in scores.topk(min(most, scores.numel())).indices.tolist()]


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
