"""An evaluation once its options are checked and its sources are open. Imports torch.

Owns where stored columns come from, and that the text is long enough before any weight is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from int8cli.checkpoint.source import Source
from int8cli.columns.from_statistics import require_same_model
from int8cli.commands.first_words import announce_duration
from int8cli.commands.options import EvaluateOptions
from int8cli.commands.ways import speed_here
from int8cli.data import SAMPLE_NAME, sample_text
from int8cli.errors import OptionError
from int8cli.estimate.ways import calibration_s, forwards_s
from int8cli.evaluation.columns import ChosenColumns, calibrated_columns, columns_from
from int8cli.evaluation.evaluate import evaluate as run_methods
from int8cli.evaluation.methods import METHODS, Method
from int8cli.evaluation.options import EvaluationRun, applicable
from int8cli.evaluation.subject import Subject, find_subject
from int8cli.llm_int8.limits import DEFAULT_OUTLIER_COLUMNS
from int8cli.llm_int8.matmul import DEFAULT_INPUTS, InputScheme
from int8cli.model.config import read_config
from int8cli.model.files import model_files
from int8cli.model.memory import return_memory_promptly
from int8cli.model.sampling import Sampling
from int8cli.model.text import Text, sequences_of
from int8cli.outliers.calibrate import CalibrateOptions
from int8cli.outliers.statistics_file import load_statistics
from int8cli.progress import Progress
from int8cli.records.conversion import STEPS
from int8cli.results.evaluation import Evaluation
from int8cli.results.method_names import SMOOTHED_WEIGHTS
from int8cli.results.units import counted

_MALLOC_KEEPS_BYTES = 32 << 20  # smaller temporaries are reused: half the CPU time, 80 MB more than with 1 MiB


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """What to evaluate and how. `methods` are keys, `work` is the directory for state."""

    methods: tuple[str, ...]
    text: Text
    sampling: Sampling
    options: EvaluateOptions
    work: Path
    progress: Progress

    def run(self, source: Source, reference: Source | None) -> Evaluation:
        return_memory_promptly(_MALLOC_KEEPS_BYTES)
        subject = find_subject(source, reference)
        methods = tuple(method for method in METHODS if method.key in self.methods)
        self._say_how_long(subject, methods)
        columns = self._columns(subject, methods)
        state = self.work / "evaluation"
        run = EvaluationRun(methods, self.sampling, subject.threshold, self.options.device, state_directory=state)
        return run_methods(subject, self.text, columns, run, self.progress)

    def _say_how_long(self, subject: Subject, methods: tuple[Method, ...]) -> None:
        if subject.survey is None:
            return
        found, speed = applicable(subject, methods), speed_here(self.options.device)
        seconds = forwards_s(subject.survey, speed, self.sampling.tokens, len(found.methods))
        needed = found.needs_columns or found.needs_smoothing
        if needed and subject.converted is None and self.options.outliers is None:
            seconds += calibration_s(subject.survey, speed, Sampling()) * (2 if found.needs_smoothing else 1)
        doing = f"{counted(len(found.methods), 'method')} on {self.sampling.tokens:,} tokens"
        announce_duration(doing, seconds, self.progress)

    def _require_long_enough(self, subject: Subject) -> None:
        """Raises TextError now rather than after a calibration of the whole model."""
        with model_files(subject.runs, subject.weights) as directory:
            sequences_of(self.text, directory, read_config(directory), self.sampling)

    def _columns(self, subject: Subject, methods: tuple[Method, ...]) -> ChosenColumns | None:
        """The columns to store for a 16-bit model, if a method needs them: from statistics or from a calibration."""
        options = self.options
        found = applicable(subject, methods)
        if subject.converted is not None or not (found.needs_columns or found.needs_smoothing):
            return None
        assert subject.survey is not None
        limit = DEFAULT_OUTLIER_COLUMNS if options.outlier_columns is None else options.outlier_columns
        if options.outliers is not None:
            if found.needs_smoothing:
                raise OptionError(
                    "the smoothed methods need a calibration of their own, not statistics from a file",
                    option="outliers",
                    hint="Leave the statistics out, or the smoothed methods.",
                )
            statistics = load_statistics(options.outliers)
            require_same_model(statistics, subject.runs, subject.survey)
            if statistics.provenance.text_sha256 == self.text.sha256:
                self.progress.note("warning: the statistics were made from the same text that is evaluated")
            return columns_from(statistics, limit)
        self._require_long_enough(subject)
        how = CalibrateOptions(
            device=options.device,
            state_directory=self.work / "blocks",
            stored_columns=limit if found.needs_smoothing else 0,
            smooth=found.needs_smoothing,
            smooth_for=smoothed_for(found.methods),
            smooth_steps=STEPS[options.smooth],
        )
        sample = Text.decode(SAMPLE_NAME, sample_text())
        return calibrated_columns(subject, sample, self.text, limit, how, self.progress)


def smoothed_for(methods: Sequence[Method]) -> InputScheme | None:
    """The inputs of the product that exponents are chosen for: all smoothed methods share them."""
    smoothed = {method.key for method in methods if method.needs_smoothing}
    return None if smoothed == {SMOOTHED_WEIGHTS} else DEFAULT_INPUTS
