"""The ways to convert a model on this machine: which there are, and what each takes."""

from int8cli.checkpoint.source import Source
from int8cli.columns.foreseen import surveys_by_mode
from int8cli.columns.wanted import AUTO, MODES, ColumnsWanted
from int8cli.commands.options import DeviceName
from int8cli.commands.places import cache_directory
from int8cli.conversion.convert import ConversionRun
from int8cli.estimate.ways import Candidate, Way, way_of
from int8cli.machine.speed import Speed, measured_beside, remember, remembered, usable_cores
from int8cli.planning.room import room_needed
from int8cli.planning.survey import Survey
from int8cli.progress import Progress
from int8cli.records.conversion import FROM_STATISTICS
from int8cli.workers.torch_start import start_torch


def ways_to_convert(
    source: Source, survey: Survey, run: ConversionRun, wanted: ColumnsWanted, speed: Speed | None
) -> tuple[Way, ...]:
    """Every way for this model, the wanted one first."""
    surveys = surveys_by_mode(wanted, source, survey)
    mode = wanted.mode_to_resume
    if mode not in MODES:
        mode = FROM_STATISTICS
        surveys[mode] = next(iter(surveys.values()))
    first = next(iter(surveys)) if mode == AUTO or mode not in surveys else mode
    names = [contents.file_name for contents in survey.shards]
    ways = []
    for each in (first, *(other for other in surveys if other != first)):
        rooms = room_needed(source, surveys[each], names, run.output, run.at_once)
        candidate = Candidate(each, surveys[each], sum(room.needed_bytes for room in rooms))
        ways.append(way_of(candidate, speed, wanted.sampling, threads=run.threads * run.workers))
    return tuple(ways)


def speed_here(device: DeviceName) -> Speed:
    """The speed of this machine, measured in this process unless it is remembered. Imports torch then."""
    known = remembered(cache_directory())
    if known is not None and device == "cpu":
        return known
    start_torch()
    from int8cli.machine.measure import measure

    found = measure(usable_cores(), device)
    return found if device != "cpu" else remember(found, cache_directory())


def speed_without_torch(progress: Progress) -> Speed | None:
    """The speed of its processor, measured in a process of its own unless it is remembered; None if that fails."""
    if remembered(cache_directory()) is None:
        progress.note("measuring the speed of this machine, once")
    return measured_beside(cache_directory())
