"""Outlier statistics of a model: its blocks run on text, and the input of every linear layer is measured.

Owns how the engine in `model` is used for this, and when saved state is valid. Prints nothing; reports to a Progress.
"""

import dataclasses
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from int8cli.checkpoint.source import ShardFile, Source
from int8cli.checkpoint.tensor import ShardContents
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.errors import CannotRunError
from int8cli.llm_int8.inputs import THRESHOLD
from int8cli.llm_int8.limits import EXACT_STEPS, Steps
from int8cli.llm_int8.matmul import DEFAULT_INPUTS, InputScheme
from int8cli.model.block_progress import begin_blocks
from int8cli.model.files import model_files
from int8cli.model.loaded_unit import LoadedUnit
from int8cli.model.memory import available_bytes, too_little_memory
from int8cli.model.sampling import Sampling
from int8cli.model.saved_states import SavedStates, read_back, resumed_or_started_over
from int8cli.model.skeleton import Skeleton, build_skeleton
from int8cli.model.stream import StreamedModel
from int8cli.model.text import Text, sequences_of
from int8cli.outliers.statistics import OutlierStatistics, Provenance, SiteStatistics
from int8cli.outliers.statistics_file import load_statistics, save_statistics
from int8cli.outliers.unit_smoothing import UnitSmoother
from int8cli.outliers.unit_watch import UnitWatch
from int8cli.planning.survey import Survey, model_fingerprint
from int8cli.progress import Progress
from int8cli.results.units import human_bytes, told_apart

TASK = "calibrate"


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """How to calibrate.

    `state_directory` is for the state between blocks; None keeps it in memory. The directory is removed at the end
    unless `leave_state` is set: then the same call finishes at once. Links are followed up to `state_below`, by default
    the directory above it, but not below. With `stored_columns`, the output error of each linear is measured, in int8
    alone and with that many columns exact. With `smooth`, the smoothing of each site is found and proved, which takes
    about as long as the rest; it is chosen for inputs that are quantized by `smooth_for`,
    or not at all, in exponents of which `smooth_steps` are a factor of 2.
    """

    sampling: Sampling = field(default_factory=Sampling)
    threshold: float = THRESHOLD
    device: str = "cpu"
    state_directory: Path | None = None
    state_below: Path | None = None
    leave_state: bool = False
    stored_columns: int = 0
    smooth: bool = False
    smooth_for: InputScheme | None = DEFAULT_INPUTS
    smooth_steps: Steps = EXACT_STEPS


@dataclass(frozen=True, slots=True)
class UnitStatistics:
    """The statistics of one unit of the model, from this run or from the run that it resumes.

    `tensors` are those of the checkpoint that the unit reads.
    """

    unit: str
    sites: tuple[SiteStatistics, ...]
    tensors: tuple[str, ...] = ()


def calibrate(
    source: Source, survey: Survey, text: Text, options: CalibrateOptions, progress: Progress
) -> OutlierStatistics:
    """Run a source's model on a text, with one block in memory, and return the statistics of its outliers.

    Each weight is read once. With the same state directory, an interrupted run resumes after its last finished block.
    Raises the errors of a bad checkpoint, text or config, NonFiniteError if the model or a weight contains NaN or
    infinity, NotEnoughMemoryError if a block does not fit.
    """
    with Calibration.of(source, survey, text, options, progress) as calibration:
        for _ in calibration.run():
            pass
        return calibration.statistics


class Calibration:
    """A calibration of one source, whose shards can be used for something else while they are on this machine.

    Make it with `of`, and run it once.
    """

    def __init__(
        self,
        source: Source,
        shards: Sequence[ShardContents],
        directory: Path,
        text: Text,
        options: CalibrateOptions,
        progress: Progress,
    ) -> None:
        """`directory` contains config.json and the tokenizer. Raises NotEnoughMemoryError if a block does not fit."""
        self._source, self._shards, self._directory = source, shards, directory
        self._options, self._progress = options, progress
        self._specs = {stored.spec.name: stored.spec for contents in shards for stored in contents.tensors}
        skeleton = build_skeleton(directory, self._specs)
        if skeleton.model.main_input_name != "input_ids":
            raise CannotRunError(f"{type(skeleton.model).__name__} needs {skeleton.model.main_input_name}, not text")
        self._sequences = sequences_of(text, directory, skeleton.model.config, options.sampling)
        self._provenance = self._make_provenance(text, skeleton)
        self._order = [unit.name for unit in skeleton.units]
        self._blocks = [unit for unit in skeleton.units if unit.is_block]
        self._require_memory(skeleton)
        self._found: dict[str, tuple[SiteStatistics, ...]] = {}
        self._smoother = UnitSmoother(options.smooth_for, steps=options.smooth_steps) if options.smooth else None
        identity = dataclasses.asdict(self._provenance) | {"device": options.device}
        identity |= {"smooth": str(options.smooth_for)} if options.smooth else {}
        identity |= {"smooth_steps": options.smooth_steps} if options.smooth_steps != EXACT_STEPS else {}
        below = options.state_below
        self._saved = SavedStates(options.state_directory, identity, below) if options.state_directory else None

    @classmethod
    @contextmanager
    def of(
        cls, source: Source, survey: Survey, text: Text, options: CalibrateOptions, progress: Progress
    ) -> "Iterator[Calibration]":
        """A calibration of a surveyed source. Its state directory is locked while the context is open."""
        with model_files(source, survey.weights) as directory:
            calibration = cls(source, survey.source_shards, directory, text, options, progress)
            try:
                yield calibration
            finally:
                if calibration._saved is not None:
                    calibration._saved.close()

    @property
    def statistics(self) -> OutlierStatistics:
        """The statistics so far."""
        units = sorted(self._found, key=self._order.index)
        return OutlierStatistics(self._provenance, tuple(site for unit in units for site in self._found[unit]))

    def run(self, require_room: Callable[[int], None] | None = None) -> Generator[UnitStatistics | ShardFile]:
        """Run the model. Yields the statistics of each unit, and each shard once the model needs no more of it.

        A shard comes after the statistics of all units that read it. Its file exists until the next step is requested;
        then a fetched copy is removed. A caller that stops early must close this generator: the fetched copies of open
        shards then remain for the next run. A run that starts over yields statistics and shards again. `require_room`
        is called before the first fetch, and again by a run that starts over, with the most bytes of fetched shards
        that will be on this machine beside what is there.
        """
        yield from resumed_or_started_over(partial(self._pass, require_room), self._saved, self._progress)
        if self._saved is not None and not self._options.leave_state:
            self._saved.clear()

    def _pass(self, require_room: Callable[[int], None] | None) -> Generator[UnitStatistics | ShardFile]:
        skeleton = build_skeleton(self._directory, self._specs)
        finished = self._saved.finished if self._saved else ()
        begin_blocks(
            self._progress,
            TASK,
            {unit.name: unit.weight_bytes for unit in self._blocks},
            steps=len(self._sequences),
            tokens=self._provenance.tokens,
            finished=finished,
        )
        self._found = dict(self._recalled())
        tensors_of = {unit.name: unit.sources for unit in skeleton.units}
        yield from (UnitStatistics(unit, sites, tensors_of[unit]) for unit, sites in self._found.items())
        watches: dict[str, UnitWatch] = {}
        with CheckpointTensors(self._source, self._shards) as tensors:
            if require_room is not None:
                require_room(tensors.added_shard_bytes(_read_in_order(skeleton, finished)))
            stream = StreamedModel(skeleton, tensors, device=self._options.device, saved=self._saved)
            with closing(stream.steps(self._sequences)) as steps:
                for step in steps:
                    yield self._run_unit(step, watches) if isinstance(step, LoadedUnit) else step
        self._progress.done(TASK)

    def _run_unit(self, loaded: LoadedUnit, watches: "dict[str, UnitWatch]") -> UnitStatistics:
        """`watches` has one entry per unit, so a unit that is called several times is watched over all calls."""
        unit = loaded.unit
        if unit.is_block:
            self._progress.advance(TASK, unit.name, 0)
        if unit.name not in watches:
            watches[unit.name] = UnitWatch(
                loaded, self._options.threshold, self._options.stored_columns, self._smoother
            )

        def on_sequence() -> None:
            if unit.is_block:
                self._progress.advance(TASK, unit.name, 1)

        sites = self._found[unit.name] = watches[unit.name].run(loaded, on_sequence)
        if unit.is_block:
            self._save(unit.name, sites)
            self._progress.done(TASK, unit.name)
        return UnitStatistics(unit.name, sites, unit.sources)

    @property
    def _largest_bytes(self) -> int:
        return max((unit.weight_bytes for unit in self._blocks), default=0)

    def _save(self, unit: str, sites: tuple[SiteStatistics, ...]) -> None:
        """Called before the engine records that a block is finished, so a finished block always has statistics."""
        if self._saved is not None:
            path = self._saved.directory / f"{unit}.safetensors"
            save_statistics(OutlierStatistics(self._provenance, sites), path, below=self._saved.below)

    def _recalled(self) -> Iterator[tuple[str, tuple[SiteStatistics, ...]]]:
        for unit in self._saved.finished if self._saved else ():
            assert self._saved is not None
            with read_back(self._saved.directory / f"{unit}.safetensors") as path:
                statistics = load_statistics(path)
            yield unit, statistics.sites

    def _make_provenance(self, text: Text, skeleton: Skeleton) -> Provenance:
        sampling = self._options.sampling
        return Provenance(
            model=self._source.identity.name,
            revision=self._source.identity.revision,
            model_fingerprint=model_fingerprint(self._source, self._shards),
            text=text.name,
            text_sha256=text.sha256,
            tokens=sum(inputs["input_ids"].numel() for inputs in self._sequences),
            sequence_length=self._sequences[0]["input_ids"].numel(),
            seed=sampling.seed,
            dtype=str(skeleton.dtype).removeprefix("torch."),
            threshold=self._options.threshold,
        )

    def _require_memory(self, skeleton: Skeleton) -> None:
        """Raise NotEnoughMemoryError if a block with one sequence in it does not fit in memory."""
        length, block_bytes = self._provenance.sequence_length, self._largest_bytes
        shapes = [self._specs[name].shape for unit in self._blocks for name in unit.sources]
        widest = max((max(shape) for shape in shapes if shape), default=0)
        heads = getattr(skeleton.model.config, "num_attention_heads", None) or 0
        activations = length * widest * 16 + (heads * length * length * 8 if isinstance(heads, int) else 0)
        whole_files = max((contents.file_bytes for contents in self._shards if not contents.mappable), default=0)
        needed = block_bytes + activations + whole_files
        available = available_bytes(self._options.device)
        if available is not None and needed > available:
            wanted, free = told_apart(needed, available)
            raise too_little_memory(
                self._options.device,
                f"one block needs {wanted} ({human_bytes(block_bytes)} of weights, "
                f"{human_bytes(needed - block_bytes)} of working memory), {free} free",
                hint="Free some memory, or use shorter sequences.",
            )


def _read_in_order(skeleton: Skeleton, finished: Collection[str]) -> list[tuple[str, ...]]:
    """The groups of tensors that are read together, in reading order: not those of finished units and the head."""
    head = skeleton.output_head()
    units = [unit for unit in skeleton.units if skeleton.module(unit) is not head and unit.name not in finished]
    return [unit.sources for unit in (skeleton.resident, *units)]
