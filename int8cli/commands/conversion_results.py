"""What a conversion returns, and what its plan does."""

from dataclasses import dataclass
from pathlib import Path

from int8cli.estimate.ways import Way
from int8cli.planning.mixtures import LayoutShare
from int8cli.planning.needs import Needs
from int8cli.planning.share import PlannedShare
from int8cli.planning.survey import Survey
from int8cli.records.conversion import Settings
from int8cli.results.conversion import ConversionReport


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """A finished conversion: the directory that was written, the report in it, and what this run took.

    `peak_memory_bytes` is that of this process, None where other processes did the work. `layouts` say what each layout
    does with a mixture of experts, this conversion's first; empty for other models. `missing` are the shards of the
    source that other parts have to convert; while there are any, the report is on the shards of this part. With
    `to_publish` the shards are uploaded by parts, and the commit is still to be made.
    """

    output: Path
    report: ConversionReport
    seconds: float
    peak_memory_bytes: int | None
    layouts: tuple[LayoutShare, ...] = ()
    missing: tuple[str, ...] = ()
    to_publish: bool = False


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What a conversion would do. `survey` has the plan by tensor and all sizes, `settings` determine the bytes.

    `ways` are what it takes, and what it would take with stored columns chosen otherwise: the one planned comes first.
    For one part of a conversion, `share` is what it has to do, and `needs` are those of the part.
    """

    output: Path
    survey: Survey
    settings: Settings
    needs: Needs
    ways: tuple[Way, ...]
    share: PlannedShare | None = None
