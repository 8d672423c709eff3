"""Which outlier columns the user asked for, and what a strategy for choosing them is.

Owns the names of the modes, and the strategy that stores nothing. Needs no torch: a conversion without stored columns
needs it only in its workers.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from int8cli.conversion.column_source import MakeColumns, NoColumns, Ready
from int8cli.llm_int8.limits import Steps
from int8cli.model.sampling import Sampling
from int8cli.planning.decisions import Decision
from int8cli.planning.survey import Survey
from int8cli.records.conversion import (
    EXACT_SMOOTHING,
    FINE_SMOOTHING,
    FROM_ACTIVATIONS,
    FROM_WEIGHTS,
    NO_OUTLIERS,
    NO_SMOOTHING,
    STEPS,
    Settings,
)

AUTO = "auto"
MODES = (AUTO, FROM_ACTIVATIONS, FROM_WEIGHTS, NO_OUTLIERS)
SMOOTH_MODES = (AUTO, EXACT_SMOOTHING, FINE_SMOOTHING, NO_SMOOTHING)


@dataclass(frozen=True, slots=True)
class ColumnsWanted:
    """What the user asked for: one of MODES or a statistics file, and the most columns for each linear.

    `smooth`: smooth what a calibration or the file has proved. `scales`, EXACT_SMOOTHING or FINE_SMOOTHING, says how;
    None is by powers of two, or as the file has it. With `must_smooth` nothing else will do. A `text` of None means the
    built-in sample. `known` are the settings of an unfinished conversion to resume. With a `budget`, the columns of all
    linears take at most this share of the output's bytes, and `limit` is 0.
    """

    mode: str
    limit: int
    text: Path | None = None
    sampling: Sampling = field(default_factory=Sampling)
    device: Literal["cpu", "cuda"] = "cpu"
    model_threads: int = 1
    known: Settings | None = None
    smooth: bool = False
    budget: float = 0.0
    scales: str | None = None
    must_smooth: bool = False

    @property
    def stores(self) -> bool:
        """Whether any columns are wanted."""
        return bool(self.limit or self.budget)

    @property
    def steps(self) -> Steps | None:
        """How many steps of a scale are a factor of 2 if a run of the model finds it; None without smoothing."""
        return STEPS[self.scales or EXACT_SMOOTHING] if self.smooth else None

    @property
    def mode_to_resume(self) -> str:
        """The mode, or for AUTO the one that the unfinished conversion used."""
        known = self.known.outliers if self.known is not None and self.mode == AUTO else None
        return known if known in MODES else self.mode

    def nothing(self, survey: Survey) -> bool:
        """Whether there is nothing to choose."""
        nothing = not self.stores and not self.smooth
        return nothing or self.mode_to_resume == NO_OUTLIERS or not survey.plan.quantized


@dataclass(frozen=True, slots=True)
class ColumnStrategy:
    """One way to choose the columns.

    `survey` and `settings` include the stored columns. `columns` makes the source of columns.
    """

    survey: Survey
    settings: Settings
    columns: MakeColumns


def without_columns(survey: Survey, settings: Settings) -> ColumnStrategy:
    """The strategy that stores no columns."""
    return ColumnStrategy(survey, settings, Ready(NoColumns()))


def at_most(decision: Decision, limit: int) -> int:
    """How many columns a linear gets: `limit`, or all of a narrower one."""
    return min(limit, decision.computed_shape[1])
