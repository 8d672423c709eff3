"""An evaluation once its options are checked and its sources are open. Imports torch.

Owns where stored columns come from, and that the text is long enough before any weight is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from int8cli.checkpoint.source import Source
from int8cli.columns.foreseen import require_scales
from int8cli.columns.from_statistics import require_same_model
from int8cli.columns.smoothing import require_consistent
from int8cli.commands.first_words import announce_duration
from int8cli.commands.options import EvaluateOptions
from int8cli.commands.ways import speed_here
from int8cli.data import SAMPLE_NAME, sample_text
from int8cli.errors import StatisticsMismatchError
from int8cli.estimate.ways import calibration_s, forwards_s
from int8cli.evaluation.columns import ChosenColumns, calibrated_columns, columns_from, smoothing_from
from int8cli.evaluation.evaluate import evaluate as run_methods
from int8cli.evaluation.methods import METHODS, Method
from int8cli.evaluation.options import Applicable, EvaluationRun, applicable
from int8cli.evaluation.subject import Subject, find_subject
from int8cli.llm_int8.limits import DEFAULT_OUTLIER_COLUMNS
from int8cli.llm_int8.matmul import DEFAULT_INPUTS, InputScheme
from int8cli.model.config import read_config
from int8cli.model.files import model_files
from int8cli.model.memory import return_memory_promptly
from int8cli.model.sampling import Sampling
from int8cli.model.text import Text, sequences_of
from int8cli.outliers.calibrate import CalibrateOptions
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.outliers.statistics_file import load_statistics
from int8cli.progress import Progress
from int8cli.records.conversion import EXACT_SMOOTHING, STEPS
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
            return self._columns_of_file(options.outliers, subject, found, limit)
        self._require_long_enough(subject)
        how = CalibrateOptions(
            device=options.device,
            state_directory=self.work / "blocks",
            stored_columns=limit if found.needs_smoothing else 0,
            smooth=found.needs_smoothing,
            smooth_for=smoothed_for(found.methods),
            smooth_steps=STEPS[options.smooth or EXACT_SMOOTHING],
        )
        sample = Text.decode(SAMPLE_NAME, sample_text())
        return calibrated_columns(subject, sample, self.text, limit, how, self.progress)

    def _columns_of_file(self, file: Path, subject: Subject, found: Applicable, limit: int) -> ChosenColumns:
        """By the statistics in a file, for the smoothed methods also the exponents.

        Raises StatisticsFileError, StatisticsMismatchError.
        """
        assert subject.survey is not None
        statistics = load_statistics(file)
        require_same_model(statistics, subject.runs, subject.survey)
        if found.needs_smoothing:
            require_scales(scales_of(statistics), self.options.smooth)
            require_consistent(statistics, file.name, subject.survey.decisions)
            if smoothed_for(found.methods) is None:
                self.progress.note(
                    "The exponents in the statistics file are those for int8 inputs; a calibration finds those for "
                    "16-bit inputs."
                )
        if statistics.provenance.text_sha256 == self.text.sha256:
            self.progress.note("warning: the statistics were made from the same text that is evaluated")
        smoothing = smoothing_from(statistics, limit) if found.needs_smoothing else None
        return replace(columns_from(statistics, limit), smoothing=smoothing)


def scales_of(statistics: OutlierStatistics) -> str | None:
    """The name of the scales by which statistics smooth; None if no site could be smoothed.

    Raises StatisticsMismatchError if the calibration did not look for a smoothing.
    """
    steps = {site.smoothing.steps for site in statistics.sites if site.smoothing is not None}
    if not steps and not any(site.not_smoothed for site in statistics.sites):
        raise StatisticsMismatchError(
            "the smoothed methods need statistics that say what to smooth, and these do not",
            hint="Make statistics that do, or leave the smoothed methods or the statistics out.",
        )
    return next((name for name, each in STEPS.items() if each in steps), None)


def smoothed_for(methods: Sequence[Method]) -> InputScheme | None:
    """The inputs of the product that exponents are chosen for: all smoothed methods share them."""
    smoothed = {method.key for method in methods if method.needs_smoothing}
    return None if smoothed == {SMOOTHED_WEIGHTS} else DEFAULT_INPUTS
