"""What a conversion in parts is, by its options."""

from int8cli import __version__
from int8cli.commands.options import ConvertOptions
from int8cli.conversion.part import PartRun
from int8cli.planning.share import PlannedShare, Share
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


def planned_share(part: PartRun | None, survey: Survey) -> PlannedShare | None:
    """What a part has to do; None for the whole, and for a process that only concludes."""
    if part is None or part.share is None:
        return None
    names = part.shards(survey)
    files = [*(survey.outputs[name] for name in names), *filter(None, map(survey.sidecars.get, names))]
    source_bytes = sum(contents.file_bytes for contents in survey.shards if contents.file_name in names)
    return PlannedShare(part.share, names, source_bytes, sum(file.file_bytes for file in files))


def sizes_of(survey: Survey) -> str:
    """The bytes and the shards of a source, in words."""
    return f"{human_bytes(survey.source_bytes)} in {counted(len(survey.shards), 'shard')}"
