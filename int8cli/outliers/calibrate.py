"""Outlier statistics of a model: its blocks run over text, and every linear layer's input looked at.

Owns what is asked of the engine and what is made of its answers, and when the state on disk counts. Prints nothing: a
Progress is told.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8cli.checkpoint.source import LocalFile, Source
from int8cli.checkpoint.tensor import ShardContents
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.errors import CannotRunError, NonFiniteRunError, NotEnoughMemoryError, UnsupportedModelError
from int8cli.llm_int8.matmul import DEFAULT_INPUTS
from int8cli.llm_int8.measure import measured_output_errors
from int8cli.llm_int8.outliers import (
    THRESHOLD,
    InputStatistics,
    InputSummary,
    NonFiniteInputError,
    choose_columns,
    column_errors,
)
from int8cli.llm_int8.quantize import NonFiniteWeightError
from int8cli.model.block_progress import begin_blocks
from int8cli.model.files import model_files
from int8cli.model.memory import available_bytes
from int8cli.model.sampling import Sampling
from int8cli.model.saved_states import KeptStates
from int8cli.model.sites import Site, first_hidden, weight_of
from int8cli.model.skeleton import Skeleton, Unit, build_skeleton
from int8cli.model.stream import LoadedUnit, StreamedModel
from int8cli.model.text import Text, sequences_of
from int8cli.outliers.statistics import (
    RESIDUAL,
    LinearStatistics,
    OutlierStatistics,
    Provenance,
    SiteStatistics,
    load_statistics,
    save_statistics,
)
from int8cli.planning.survey import Survey, model_fingerprint
from int8cli.progress import Progress

TASK = "calibrate"
_STEP_ELEMENTS = 1 << 22
# Positions of the last sequence on which a linear is run in int8 to measure its error, spread over it.
_EXAMPLES = 128


class Companion:
    """Goes along with a calibration, for what else is to be done while its shards are here. Here none does anything."""

    def starting(self, held_bytes: int) -> None:
        """The run begins; so many bytes of shards are on this machine at once."""

    def learnt(self, sites: tuple[SiteStatistics, ...]) -> None:
        """A unit is done, in this run or in an earlier one that is gone on with."""

    def leaving(self, shard: str, local: LocalFile) -> None:
        """All that is wanted of a shard has been read; it goes when this returns."""


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """`kept_in`: the directory for the state between blocks, None keeps it all in memory.

    It is removed at the end but with `leave_state`, which lets the same call come to its end again at once.
    `stored_columns`: measure each linear's output error in int8, alone and with so many columns of it exact.
    """

    sampling: Sampling = field(default_factory=Sampling)
    threshold: float = THRESHOLD
    device: str = "cpu"
    kept_in: Path | None = None
    leave_state: bool = False
    stored_columns: int = 0


def calibrate(
    source: Source,
    survey: Survey,
    text: Text,
    options: CalibrateOptions,
    progress: Progress,
    companion: Companion | None = None,
) -> OutlierStatistics:
    """Run a source's model over a text, with one block of it in memory, and take down its outliers.

    Each weight is read once. A run that was killed goes on after its last finished block, if it is given the same
    directory for its state. Raises the errors of a bad checkpoint, text or config, NonFiniteError where the model or a
    weight holds NaN, NotEnoughMemoryError where a block does not fit.
    """
    with model_files(source, survey.weights) as directory:
        calibration = _Calibration(source, survey.layouts, directory, text, options, progress, companion or Companion())
        with closing(calibration):
            try:
                return calibration.run()
            except UnsupportedModelError:
                if not calibration.resumed:
                    raise
                # A model that hands more from block to block than their outputs cannot go on in the middle.
                progress.note("this model cannot go on from the middle: starting over")
                calibration.forget()
                return calibration.run()


class _Calibration:
    """One calibration of one source."""

    def __init__(
        self,
        source: Source,
        layouts: Sequence[ShardContents],
        directory: Path,
        text: Text,
        options: CalibrateOptions,
        progress: Progress,
        companion: Companion,
    ) -> None:
        self._source, self._layouts, self._directory = source, layouts, directory
        self._options, self._progress, self._companion = options, progress, companion
        self._specs = {stored.spec.name: stored.spec for layout in layouts for stored in layout.tensors}
        skeleton = build_skeleton(directory, self._specs)
        if skeleton.model.main_input_name != "input_ids":
            raise CannotRunError(
                f"{type(skeleton.model).__name__} takes {skeleton.model.main_input_name}, and there is only text"
            )
        self._sequences = sequences_of(text, directory, skeleton.model.config, options.sampling)
        self._provenance = self._make_provenance(text, skeleton)
        identity = dataclasses.asdict(self._provenance) | {"device": options.device}
        self._kept = KeptStates(options.kept_in, identity) if options.kept_in else None
        self.resumed = bool(self._kept and self._kept.finished)

    def run(self) -> OutlierStatistics:
        skeleton = build_skeleton(self._directory, self._specs)
        blocks = [unit for unit in skeleton.units if unit.is_block]
        finished = {_unit_of(key) for key in self._kept.finished} if self._kept else set()
        largest = max((unit.weight_bytes for unit in blocks), default=0)
        self._require_memory(skeleton, largest)
        begin_blocks(
            self._progress,
            TASK,
            {unit.name: unit.weight_bytes for unit in blocks},
            steps=len(self._sequences),
            tokens=self._provenance.tokens,
            finished=finished,
        )
        found: dict[str, tuple[SiteStatistics, ...]] = dict(self._recalled())
        with CheckpointTensors(self._source, self._layouts, self._companion.leaving) as tensors:
            self._companion.starting(tensors.held_bytes([unit.sources for unit in self._read_in_order(skeleton)]))
            for recalled in found.values():
                self._companion.learnt(recalled)
            stream = StreamedModel(skeleton, tensors, device=self._options.device, kept=self._kept)
            accumulators: dict[str, _UnitStatistics] = {}
            for loaded in stream.units(self._sequences):
                unit = loaded.unit
                if unit.is_block:
                    self._progress.advance(TASK, unit.name, 0)
                watch = accumulators.setdefault(unit.name, _UnitStatistics(loaded, self._options, self._progress))
                found[unit.name] = watch.run(loaded)
                self._companion.learnt(found[unit.name])
                if unit.is_block:
                    self._put_down(unit.name, found[unit.name])
                    self._progress.done(TASK, unit.name)
        self._progress.done(TASK)
        order = [unit.name for unit in skeleton.units]
        sites = [site for name in sorted(found, key=order.index) for site in found[name]]
        if not self._options.leave_state:
            self.forget()
        return OutlierStatistics(self._provenance, tuple(sites))

    def _read_in_order(self, skeleton: Skeleton) -> list[Unit]:
        """What is read of the model, in the order in which it is."""
        head = skeleton.output_head()
        return [skeleton.resident, *(unit for unit in skeleton.units if skeleton.module(unit) is not head)]

    def forget(self) -> None:
        """Remove the state on disk."""
        self.resumed = False
        if self._kept is not None:
            self._kept.clear()

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()

    def _put_down(self, unit: str, sites: tuple[SiteStatistics, ...]) -> None:
        """Before the engine puts a block on record as finished, its statistics are there."""
        if self._kept is not None:
            save_statistics(OutlierStatistics(self._provenance, sites), self._kept.directory / f"{unit}.safetensors")

    def _recalled(self) -> Iterator[tuple[str, tuple[SiteStatistics, ...]]]:
        if self._kept is not None:
            for key in self._kept.finished:
                unit = _unit_of(key)
                yield unit, load_statistics(self._kept.directory / f"{unit}.safetensors").sites

    def _make_provenance(self, text: Text, skeleton: Skeleton) -> Provenance:
        sampling = self._options.sampling
        return Provenance(
            model=self._source.identity.name,
            revision=self._source.identity.revision,
            model_fingerprint=model_fingerprint(self._source, self._layouts),
            text=text.name,
            text_sha256=text.sha256,
            tokens=sum(inputs["input_ids"].numel() for inputs in self._sequences),
            sequence_length=self._sequences[0]["input_ids"].numel(),
            seed=sampling.seed,
            dtype=str(skeleton.dtype).removeprefix("torch."),
            threshold=self._options.threshold,
        )

    def _require_memory(self, skeleton: Skeleton, block_bytes: int) -> None:
        """Raise NotEnoughMemoryError if a block and a sequence in it are more than there is."""
        length = self._provenance.sequence_length
        widest = max((max(spec.shape) for spec in self._block_specs(skeleton)), default=0)
        heads = getattr(skeleton.model.config, "num_attention_heads", None) or 0
        activations = length * widest * 16 + (heads * length * length * 8 if isinstance(heads, int) else 0)
        whole_files = max((layout.file_bytes for layout in self._layouts if not layout.mappable), default=0)
        needed = block_bytes + activations + whole_files
        available = available_bytes(self._options.device)
        if available is not None and needed > available:
            raise NotEnoughMemoryError(
                f"one block takes {needed:,} bytes ({block_bytes:,} of weights, {needed - block_bytes:,} to work in), "
                f"and {available:,} are free",
                hint="Free some memory, or use shorter sequences.",
            )

    def _block_specs(self, skeleton: Skeleton) -> Iterator[Any]:
        for unit in skeleton.units:
            if unit.is_block:
                yield from (self._specs[name] for name in unit.sources if self._specs[name].shape)


def _unit_of(key: str) -> str:
    """The unit whose visit a key of the saved states names."""
    return key.rpartition("@")[0]


class _UnitStatistics:
    """What is taken down of one unit; of one that is called several times in a forward, over all calls."""

    def __init__(self, loaded: LoadedUnit, options: CalibrateOptions, progress: Progress) -> None:
        self._options, self._progress = options, progress
        self._unit = loaded.unit
        self._inputs: dict[str, InputStatistics] = {}
        self._residual: InputStatistics | None = None
        self._outputs: dict[str, _MeanSquare] = {}
        self._examples: dict[str, Tensor] = {}
        self._weights = {name: _weight_figures(name, linear) for name, linear in loaded.linears.items()}
        self._biases: dict[str, Tensor | None] = {}

    def run(self, loaded: LoadedUnit) -> tuple[SiteStatistics, ...]:
        """Bring all sequences through and return the unit's sites, a residual one for the output of a block."""
        self._biases = {name: getattr(linear, "bias", None) for name, linear in loaded.linears.items()}

        def take_output(output: Any) -> None:
            self._take_residual(output)
            if self._unit.is_block:
                self._progress.advance(TASK, self._unit.name, 1)

        sites = loaded.run(on_input=self._take_input, on_linear_output=self._take_linear_output, on_output=take_output)
        found = [self._site(site, loaded.linears) for site in sites]
        if self._residual is not None:
            unit = self._unit
            summary = self._residual.summary()
            found.append(SiteStatistics(unit.name, RESIDUAL, unit.stack, unit.index, summary, ()))
        return tuple(found)

    def _take_input(self, name: str, x: Tensor) -> None:
        with _naming(f"{name}: its input"):
            self._statistics(name, x).update(x)
        if self._options.stored_columns:
            rows = x.detach().reshape(-1, x.shape[-1])
            self._examples[name] = rows[:: max(1, rows.shape[0] // _EXAMPLES)][:_EXAMPLES].clone()

    def _take_residual(self, output: Any) -> None:
        hidden = first_hidden(output)
        if self._unit.is_block and hidden is not None:
            with _naming(f"{self._unit.name}: its output"):
                if self._residual is None:
                    self._residual = self._new(hidden)
                self._residual.update(hidden)

    def _take_linear_output(self, name: str, y: Tensor) -> None:
        self._outputs.setdefault(name, _MeanSquare()).update(y, self._biases[name])

    def _statistics(self, name: str, x: Tensor) -> InputStatistics:
        if name not in self._inputs:
            self._inputs[name] = self._new(x)
        return self._inputs[name]

    def _new(self, x: Tensor) -> InputStatistics:
        return InputStatistics(x.shape[-1], threshold=self._options.threshold, device=x.device)

    def _site(self, site: Site, modules: Mapping[str, nn.Module]) -> SiteStatistics:
        summary = self._inputs[site.name].summary()
        linears = []
        for name in site.linears:
            linear = dataclasses.replace(self._weights[name], output_mean_square=self._outputs[name].value)
            if self._options.stored_columns:
                linear = self._measured(linear, summary, self._examples[site.name], weight_of(modules[name]))
            linears.append(linear)
        return SiteStatistics(site.name, site.kind, site.stack, site.layer, summary, tuple(linears))

    def _measured(
        self, linear: LinearStatistics, summary: InputSummary, examples: Tensor, weight: Tensor
    ) -> LinearStatistics:
        """The linear run in int8 on some of its inputs, without and with the columns that its statistics choose."""
        stored = choose_columns(summary, linear.weight_error, self._options.stored_columns)
        without, with_stored = measured_output_errors(examples, weight, stored, DEFAULT_INPUTS)
        return dataclasses.replace(linear, stored=stored, measured_error=without, measured_error_stored=with_stored)


class _MeanSquare:
    """The mean over positions of the squared length of a linear's output without its bias."""

    def __init__(self) -> None:
        self._sum, self._positions = 0.0, 0

    def update(self, y: Tensor, bias: Tensor | None) -> None:
        rows = y.reshape(-1, y.shape[-1])
        step = max(1, _STEP_ELEMENTS // max(1, rows.shape[1]))
        for start in range(0, rows.shape[0], step):
            chunk = rows[start : start + step].float()
            if bias is not None:
                chunk -= bias.float()
            self._sum += float(chunk.square_().sum(dtype=torch.float64))
        self._positions += rows.shape[0]

    @property
    def value(self) -> float:
        return self._sum / max(1, self._positions)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say of what a non-finite value was part."""
    try:
        yield
    except NonFiniteInputError as error:
        raise NonFiniteRunError(
            f"{what} holds {error.value} at position {error.position:,}, dimension {error.dimension:,}",
            hint="The model overflows there, or a weight before it is damaged.",
        ) from error


def _weight_figures(name: str, linear: nn.Module) -> LinearStatistics:
    weight = weight_of(linear)
    try:
        errors, sum_squares = column_errors(weight)
    except NonFiniteWeightError as error:
        raise NonFiniteRunError(
            f"{name}: its weight holds {error.value} in input column {error.column:,}",
            hint="The checkpoint is damaged there: get the file again.",
        ) from error
    return LinearStatistics(name, weight.shape[0], weight.shape[1], errors.cpu(), sum_squares, 0.0)
