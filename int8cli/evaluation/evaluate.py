"""Evaluation of a model: all methods in one pass over its weights, with one block in memory.

Owns the order of the work: the engine runs every passage with every method, then the figures are computed. Prints
nothing; reports to a Progress.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.errors import CannotRunError, ReferenceModelError
from int8cli.evaluation.columns import ChosenColumns
from int8cli.evaluation.options import EvaluationRun, applicable
from int8cli.evaluation.predictions import Scorer, passages_of
from int8cli.evaluation.saved_sums import load_sums, run_identity, save_sums
from int8cli.evaluation.subject import Subject
from int8cli.evaluation.units import LayerSums, Trajectories, UnitEvaluation, added_sums, layer_errors
from int8cli.evaluation.weights import LayerWeights
from int8cli.llm_int8.limits import EXACT_STEPS
from int8cli.model.block_progress import begin_blocks
from int8cli.model.files import model_files
from int8cli.model.loaded_unit import LoadedUnit
from int8cli.model.memory import available_bytes, too_little_memory
from int8cli.model.saved_states import SavedStates, resumed_or_started_over
from int8cli.model.sites import linears_of
from int8cli.model.skeleton import Skeleton, build_skeleton
from int8cli.model.stream import StreamedModel
from int8cli.model.text import Text, sequences_of
from int8cli.progress import Progress
from int8cli.records.conversion import EXACT_SMOOTHING, FINE_SMOOTHING
from int8cli.results.evaluation import EvaluatedText, Evaluation, MethodResult, StoredColumnsSummary
from int8cli.results.units import told_apart
from int8cli.runtime.converted_tensors import ConvertedTensors

TASK = "evaluate"
# The memory for one method's forms of a block's weights, relative to the weights: int8, and a restored float copy.
_FORMS = 1.5
# And for the smoothed weight, with its int8 form.
_SMOOTHED_FORMS = 1.5


def evaluate(
    subject: Subject,
    text: Text,
    columns: ChosenColumns | None,
    options: EvaluationRun,
    progress: Progress,
) -> Evaluation:
    """Run a subject on a text with each method, and compare.

    `columns` are the columns to store for a 16-bit model, if a method needs them. With the same state directory, an
    interrupted run resumes after its last finished block. Raises the errors of a bad checkpoint, text or config,
    NonFiniteError if a weight or the 16-bit model's predictions are not finite, NotEnoughMemoryError if a block does
    not fit.
    """
    with (
        model_files(subject.runs, subject.weights) as directory,
        closing(_Run(subject, directory, text, columns, options, progress)) as run,
    ):
        return run.run()


class _Run:
    """One evaluation of one subject."""

    def __init__(
        self,
        subject: Subject,
        directory: Path,
        text: Text,
        columns: ChosenColumns | None,
        options: EvaluationRun,
        progress: Progress,
    ) -> None:
        self._begun_s = time.monotonic()
        self._subject, self._directory, self._text = subject, directory, text
        self._columns, self._options, self._progress = columns, options, progress
        self._wanted = applicable(subject, options.methods)
        skeleton = self._build()
        self._order, self._dtype = [unit.name for unit in skeleton.units], str(skeleton.dtype)
        model = skeleton.model
        if model.main_input_name != "input_ids":
            raise CannotRunError(f"{type(model).__name__} needs {model.main_input_name}, not text")
        sequences = sequences_of(text, directory, model.config, options.sampling)
        self._length = sequences[0]["input_ids"].numel()
        self._passages = passages_of(model, sequences)
        self._predicts = self._passages[0].targets is not None
        if not self._predicts and not subject.has_reference:
            raise ReferenceModelError(
                f"{_without_predictions(skeleton)}, and measuring output errors needs 16-bit weights",
                hint="Also give the model it was made from.",
            )
        # Without predictions, the errors of layers are all there is, and these need only the 16-bit model's inputs.
        run_by = self._wanted.methods if self._predicts else self._wanted.methods[:1]
        measured = min(len(sequences), max(1, options.error_tokens // self._length))
        self._trajectories = Trajectories(run_by, len(sequences), measured)
        self._saved: SavedStates | None = None
        if options.state_directory:
            compared = [method.key for method in self._wanted.methods]
            identity = run_identity(subject, text, columns, options, self._trajectories, compared)
            self._saved = SavedStates(options.state_directory, identity)

    def run(self) -> Evaluation:
        for _ in resumed_or_started_over(self._units, self._saved, self._progress):
            pass
        if self._saved is not None:
            self._saved.clear()
        return self._evaluation()

    def close(self) -> None:
        if self._saved is not None:
            self._saved.close()

    def _units(self) -> Iterator[str]:
        """Run each unit of the model, record its sums, and yield its name."""
        skeleton = self._build()
        self._start(skeleton)
        self._scorer = Scorer(
            self._passages, len(self._trajectories.methods), has_reference=self._subject.has_reference
        )
        self._sums = dict(load_sums(self._saved)) if self._saved is not None else {}
        with ExitStack() as stack:
            tensors = stack.enter_context(self._subject.open_tensors())
            _restore_as_needed(tensors, skeleton)
            int8 = self._subject.open_int8()
            if int8 is not None:
                stack.enter_context(int8)
            weights = LayerWeights(self._subject, int8, self._columns, self._options.threshold)
            inputs = [dict(passage.inputs) for passage in self._passages for _ in self._trajectories.methods]
            for loaded in stack.enter_context(closing(self._stream(skeleton, tensors).units(inputs))):
                unit = loaded.unit.name
                found = self._run_unit(loaded, weights, _has_head(loaded, skeleton))
                self._sums[unit] = added_sums(self._sums.get(unit, ()), found)
                yield unit
        self._progress.done(TASK)

    def _build(self) -> Skeleton:
        return build_skeleton(self._directory, self._subject.specs)

    def _start(self, skeleton: Skeleton) -> None:
        """Announce the work. Raises NotEnoughMemoryError if a block does not fit."""
        blocks = [unit for unit in skeleton.units if unit.is_block]
        largest = max((unit.weight_bytes for unit in blocks), default=0)
        needed = int(largest * (1 + _FORMS + (_SMOOTHED_FORMS if self._wanted.needs_smoothing else 0.0)))
        available = available_bytes(self._options.device)
        if available is not None and needed > available:
            wanted, free = told_apart(needed, available)
            raise too_little_memory(
                self._options.device,
                f"one block with its int8 forms needs {wanted}, {free} free",
                hint="Free some memory, or run this on a machine with more.",
            )
        methods, tokens = len(self._trajectories.methods), len(self._passages) * self._length
        if self._predicts:
            keys = ", ".join(method.key for method in self._trajectories.methods)
            after_calibration = self._columns is not None and self._columns.calibrated
            step = "Step 2 of 2: evaluating" if after_calibration else "evaluating"
            self._progress.note(f"{step} {methods} methods in one pass over the weights: {keys}")
        else:
            self._progress.note(f"{_without_predictions(skeleton)}: measuring only output errors")
        begin_blocks(
            self._progress,
            TASK,
            {unit.name: unit.weight_bytes for unit in blocks},
            steps=self._trajectories.count,
            tokens=tokens,
            methods=methods,
            finished=self._saved.finished if self._saved else (),
        )

    def _stream(self, skeleton: Skeleton, tensors: CheckpointTensors) -> StreamedModel:
        def take(sequence: int, output: Any) -> None:
            self._scorer.take(*self._trajectories.place(sequence), output)

        return StreamedModel(
            skeleton,
            tensors,
            device=self._options.device,
            to_head=not self._predicts,
            saved=self._saved,
            on_result=take if self._predicts else _dropped,
        )

    def _run_unit(self, loaded: LoadedUnit, weights: LayerWeights, has_head: bool) -> tuple[LayerSums, ...]:
        unit, progress = loaded.unit, self._progress

        def take_output(_: Any) -> None:
            if unit.is_block:
                progress.advance(TASK, unit.name, 1)

        if unit.is_block:
            progress.advance(TASK, unit.name, 0)
        compared = [method for method in self._wanted.methods if method.product] if self._subject.has_reference else []
        evaluation = UnitEvaluation(loaded, weights.layers(loaded), self._trajectories, compared)
        found = evaluation.run(has_head=has_head, on_output=take_output)
        weights.release(loaded)
        if unit.is_block:
            if self._saved is not None:
                save_sums(self._saved, unit.name, found)
            progress.done(TASK, unit.name)
        return found

    def _evaluation(self) -> Evaluation:
        subject, identity = self._subject, self._subject.source.identity
        layers = [layer for unit in sorted(self._sums, key=self._order.index) for layer in self._sums[unit]]
        compared = [method for method in self._wanted.methods if method.product]
        errors = {method.key: layer_errors(layers, place) for place, method in enumerate(compared)}
        results = tuple(
            MethodResult(
                method.key,
                "32 bit" if method.product is None and self._dtype == "torch.float32" else method.label,
                self._scorer.scores(place) if self._predicts else None,
                errors.get(method.key, ()) if subject.has_reference else (),
            )
            for place, method in enumerate(self._wanted.methods)
        )
        return Evaluation(
            model=identity.name,
            revision=identity.revision,
            converted=subject.converted is not None,
            reference=subject.runs.identity.name if subject.has_reference else None,
            dtype=self._dtype.removeprefix("torch."),
            text=self._evaluated_text(),
            threshold=self._options.threshold,
            columns=self._stored_columns(),
            int8_layers=len(subject.modules),
            error_tokens=self._trajectories.measured * self._length if subject.has_reference else 0,
            methods=results,
            notes=self._wanted.notes,
            seconds=time.monotonic() - self._begun_s,
            inputs=subject.inputs,
            smooth=self._smooth(),
        )

    def _smooth(self) -> str | None:
        """The scales of the smoothed methods, by name; None without such methods."""
        smoothing = self._columns.smoothing if self._columns is not None else None
        if not self._wanted.needs_smoothing or smoothing is None:
            return None
        fine = any(each.steps != EXACT_STEPS for each in smoothing.values())
        return FINE_SMOOTHING if fine else EXACT_SMOOTHING

    def _evaluated_text(self) -> EvaluatedText:
        targets = [passage.targets.numel() for passage in self._passages if passage.targets is not None]
        count, text = len(self._passages), self._text
        seed = self._options.sampling.seed
        return EvaluatedText(text.name, text.sha256, count * self._length, count, self._length, seed, sum(targets))

    def _stored_columns(self) -> StoredColumnsSummary | None:
        converted = self._subject.converted
        if not self._wanted.needs_columns:
            return None
        if converted is None:
            return self._columns.provenance if self._columns else None
        return StoredColumnsSummary(
            None, "", "", 0, sum(converted.exact_column_counts) / max(1, len(converted.modules))
        )


def _restore_as_needed(tensors: CheckpointTensors, skeleton: Skeleton) -> None:
    """Have the int8 weights restored in the dtype and orientation of the model."""
    if isinstance(tensors, ConvertedTensors):
        from transformers.pytorch_utils import Conv1D

        linears = linears_of(skeleton.model)
        tensors.dtype = skeleton.dtype
        tensors.transposed = frozenset(
            skeleton.weight_name(name) for name, module in linears.items() if isinstance(module, Conv1D)
        )


def _has_head(loaded: LoadedUnit, skeleton: Skeleton) -> bool:
    """Whether a unit contains the output head."""
    head = skeleton.output_head()
    return any(module is head for module in loaded.module.modules())


def _without_predictions(skeleton: Skeleton) -> str:
    """What to say of a model that predicts nothing: a head that is missing may be a file that is missing."""
    if skeleton.stands_for:
        return f"the checkpoint has no weights for the head of {skeleton.stands_for}, so it predicts no next token"
    return f"{type(skeleton.model).__name__} predicts no next token"


def _dropped(_: int, __: Any) -> None:
    """Ignore the output of a model without predictions."""
