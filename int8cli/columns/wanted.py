"""What a user asks for of outlier columns, and what a strategy to choose them is.

Owns the words, and the way that stores nothing. Needs no torch, which a conversion without stored columns, whose
workers have it, can then do without.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from int8cli.conversion.column_source import ColumnSource, NoColumns
from int8cli.model.sampling import Sampling
from int8cli.planning.survey import Survey
from int8cli.progress import Progress
from int8cli.records.store import FROM_ACTIVATIONS, FROM_WEIGHTS, NO_OUTLIERS, Settings

AUTO = "auto"
MODES = (AUTO, FROM_ACTIVATIONS, FROM_WEIGHTS, NO_OUTLIERS)
# Input columns of each linear that are stored exactly, at most: 1.5 % more bytes of SmolLM2-135M (576 wide), fewer of
# wider models. With 4, 8 and 10 of them, and zero-point inputs, it was 0.0069, 0.0056 and 0.0053 nats from 16 bit;
# without any 0.0208; 0.0235 by bitsandbytes' own LLM.int8().
DEFAULT_OUTLIER_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class ColumnsWanted:
    """What the user asked for: one of MODES, or a file of statistics; how many columns of each linear at most.

    `text` None means the sample that comes along. `known` are the settings of a conversion that is to be gone on with.
    """

    mode: str
    limit: int
    text: Path | None = None
    sampling: Sampling = field(default_factory=Sampling)
    device: str = "cpu"
    model_threads: int = 1
    known: Settings | None = None

    @property
    def mode_to_go_on_with(self) -> str:
        """The mode, or for AUTO the one that was gone before."""
        known = self.known.outliers if self.known is not None and self.mode == AUTO else None
        return known if known in MODES else self.mode

    def nothing(self, survey: Survey) -> bool:
        """Whether there is nothing to choose."""
        return not self.limit or self.mode_to_go_on_with == NO_OUTLIERS or not survey.plan.quantized


@dataclass(frozen=True, slots=True)
class ColumnStrategy:
    """One way to know the columns: the survey and settings that it makes, and the source of columns once it is gone."""

    survey: Survey
    settings: Settings
    columns: Callable[[Progress], ColumnSource]
    arithmetic_s: Callable[[], float] = lambda: 0.0  # what knowing them takes, told by a product timed here


def without_columns(survey: Survey, settings: Settings) -> ColumnStrategy:
    """Nothing is stored: there is nothing to know."""
    return ColumnStrategy(survey, settings, lambda progress: NoColumns())
