"""What an evaluation is asked for, and what of it can be done for a subject."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from int8cli.errors import UnsupportedModelError
from int8cli.evaluation.methods import METHODS, Method
from int8cli.evaluation.subject import Subject
from int8cli.llm_int8.inputs import THRESHOLD
from int8cli.model.sampling import Sampling
from int8cli.results.evaluation import REFERENCE

ERROR_TOKENS = 1024  # the layers' errors settle long before: they are means over all values of a layer's output


@dataclass(frozen=True, slots=True)
class EvaluationRun:
    """`methods` are those to compare. Those that cannot be computed for the subject are left out, with a note.

    `error_tokens`: on how many tokens the layers' errors are measured, in whole sequences and at least one.
    `state_directory`: for the state between blocks, removed at the end; None keeps all state in memory.
    """

    methods: tuple[Method, ...] = tuple(method for method in METHODS if method.by_default)
    sampling: Sampling = field(default_factory=Sampling)
    threshold: float = THRESHOLD
    device: str = "cpu"
    error_tokens: int = ERROR_TOKENS
    state_directory: Path | None = None


@dataclass(frozen=True, slots=True)
class Applicable:
    """The methods that can be computed for a subject, the 16-bit model first where it is there; and what to say."""

    methods: tuple[Method, ...]
    notes: tuple[str, ...]

    @property
    def needs_columns(self) -> bool:
        return any(method.needs_columns for method in self.methods)


def applicable(subject: Subject, methods: Sequence[Method]) -> Applicable:
    """What of the methods asked for can be computed. Raises UnsupportedModelError where none is left."""
    notes = []
    left = [method for method in methods if method.product is not None]
    if not subject.has_reference:
        without = [method.label for method in left if method.needs_weight]
        left = [method for method in left if not method.needs_weight]
        notes.append("without the 16-bit model, perplexities cannot be compared and output errors are unknown")
        if without:
            notes.append(f"left out because they need 16-bit weights: {'; '.join(without)}")
    if subject.converted is not None and not subject.has_columns and any(method.needs_columns for method in left):
        left = [method for method in left if not method.needs_columns]
        notes.append("no stored columns: this conversion has none")
    if not left and not (subject.has_reference and methods):
        raise UnsupportedModelError(
            f"none of these methods works for {subject.source.identity.name}", hint=". ".join(notes)
        )
    reference = [method for method in METHODS if method.key == REFERENCE and subject.has_reference]
    return Applicable((*reference, *left), tuple(notes))
