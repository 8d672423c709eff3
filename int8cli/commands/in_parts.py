"""What a conversion in parts is, by its options."""

from int8cli import __version__
from int8cli.commands.options import ConvertOptions
from int8cli.conversion.part import PartRun
from int8cli.planning.share import Share
from int8cli.planning.survey import Survey
from int8cli.records.part import new_token
from int8cli.results.units import counted, human_bytes


def part_of(options: ConvertOptions) -> PartRun | None:
    """The part of a conversion that is wanted; None for the whole."""
    if options.part is None and not options.finish:
        return None
    return PartRun(Share(*options.part) if options.part is not None else None, new_token(), __version__)


def shards_of(part: PartRun | None, survey: Survey) -> Survey:
    """The shards of a part, or all of them."""
    return survey if part is None else survey.only(part.shards(survey))


def sizes_of(survey: Survey) -> str:
    """The bytes and the shards of a source, in words."""
    return f"{human_bytes(survey.source_bytes)} in {counted(len(survey.shards), 'shard')}"
