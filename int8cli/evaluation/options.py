"""The options of an evaluation, and which methods work for a subject."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from int8cli.errors import UnsupportedModelError
from int8cli.evaluation.methods import METHODS, Method
from int8cli.evaluation.subject import Subject
from int8cli.llm_int8.inputs import THRESHOLD
from int8cli.model.sampling import Sampling
from int8cli.results.evaluation import REFERENCE

ERROR_TOKENS = 1024  # far more than needed: a layer's error is a mean over all values of its output


@dataclass(frozen=True, slots=True)
class EvaluationRun:
    """How to evaluate.

    `methods` are those to compare. Methods that do not work for the subject are left out, with a note. `error_tokens`
    is the number of tokens on which the errors of layers are measured, in whole sequences, at least one.
    `state_directory` is for the state between blocks and is removed at the end; None keeps all state in memory.
    """

    methods: tuple[Method, ...] = tuple(method for method in METHODS if method.by_default)
    sampling: Sampling = field(default_factory=Sampling)
    threshold: float = THRESHOLD
    device: str = "cpu"
    error_tokens: int = ERROR_TOKENS
    state_directory: Path | None = None


@dataclass(frozen=True, slots=True)
class Applicable:
    """The methods that work for a subject, with the 16-bit model first if it is available, and notes for the user."""

    methods: tuple[Method, ...]
    notes: tuple[str, ...]

    @property
    def needs_columns(self) -> bool:
        return any(method.needs_columns for method in self.methods)

    @property
    def needs_smoothing(self) -> bool:
        return any(method.needs_smoothing for method in self.methods)


def applicable(subject: Subject, methods: Sequence[Method]) -> Applicable:
    """The requested methods that work for a subject. Raises UnsupportedModelError if there are none."""
    notes = []
    possible = [method for method in methods if method.product is not None]
    if not subject.has_reference:
        impossible = [method.label for method in possible if method.needs_weight]
        possible = [method for method in possible if not method.needs_weight]
        notes.append("without the 16-bit model, perplexities cannot be compared and output errors are unknown")
        if impossible:
            notes.append(f"left out because they need 16-bit weights: {'; '.join(impossible)}")
    if subject.converted is not None and not subject.has_columns and any(method.needs_columns for method in possible):
        possible = [method for method in possible if not method.needs_columns]
        notes.append("this conversion has no stored columns")
    if subject.converted is not None and any(method.needs_smoothing for method in possible):
        possible = [method for method in possible if not method.needs_smoothing]
        notes.append("smoothing is found in a 16-bit model, so the smoothed methods are left out")
    if not possible and not (subject.has_reference and methods):
        raise UnsupportedModelError(
            f"none of these methods works for {subject.source.identity.name}", hint=". ".join(notes)
        )
    reference = [method for method in METHODS if method.key == REFERENCE and subject.has_reference]
    return Applicable((*reference, *possible), tuple(notes))
