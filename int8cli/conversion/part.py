"""One of several processes that convert the shards of one checkpoint into one directory, and who concludes.

Owns what makes it safe that they know nothing of each other: every process writes under names of its own and renames, a
record follows its shard, and the files that describe the whole are written by every process that finds all records.
Two that write one file write the same bytes. Locks only keep other kinds of runs away; where the machines' disk has
none, nothing here depends on them.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from int8cli.checkpoint.lock import locked, shared
from int8cli.checkpoint.source import Source
from int8cli.conversion.announce import TASK, begin_conversion
from int8cli.conversion.column_source import ColumnSource, NoColumns
from int8cli.conversion.convert import (
    ConversionRun,
    copy_files,
    describe,
    executor_for,
    finished_records,
    require_something_to_quantize,
    task_of,
)
from int8cli.conversion.finish import RenderCard, conversion_report, is_concluded, write_conclusion
from int8cli.conversion.late import comes_true, shown_late
from int8cli.conversion.resumed_smoothing import recorded_exponents
from int8cli.conversion.room import remove_useless_downloads, require_room, require_room_to_run
from int8cli.conversion.shard_loop import ShardLoop, ignore
from int8cli.errors import (
    CannotLockError,
    Int8cliError,
    OutputInUseError,
    SettingsMismatchError,
    UnfinishedPartsError,
)
from int8cli.planning.share import Share
from int8cli.planning.survey import Survey
from int8cli.progress import Progress
from int8cli.records.conversion import Conversion, Settings, ShardSource
from int8cli.records.part import PartRecord, joined, refuse_other_versions
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore
from int8cli.results.conversion import ConversionReport
from int8cli.results.units import counted

Records = Mapping[str, ShardRecord]


@dataclass(frozen=True, slots=True)
class PartRun:
    """One process of several. `share` is None for one that only concludes. `token` is a name that no other has."""

    share: Share | None
    token: str
    version: str

    @property
    def record(self) -> PartRecord:
        share = self.share
        return PartRecord.here(share.part if share else 0, share.parts if share else 0, self.version)

    def shards(self, survey: Survey) -> tuple[str, ...]:
        """The source files of this part."""
        sizes = {contents.file_name: contents.file_bytes for contents in survey.shards}
        return self.share.of(sizes) if self.share is not None else ()


@dataclass(frozen=True, slots=True)
class PartOutcome:
    """What has been converted when a part ends. `missing` are the source files without a record.

    While there are any, `report` is on the part's own shards, else on the whole. With `to_publish` the
    destination waits for a process that concludes.
    """

    report: ConversionReport
    missing: tuple[str, ...]
    to_publish: bool = False


def convert_part(
    source: Source,
    survey: Survey,
    settings: Settings,
    options: ConversionRun,
    part: PartRun,
    render_card: RenderCard,
    progress: Progress,
    columns: ColumnSource | None = None,
) -> PartOutcome:
    """Convert the shards of a part into `options.output`, and conclude the conversion if none is missing then.

    What the destination gets is published by a process that only concludes: two parts may end at the same time.
    Otherwise as `convert`. Raises UnfinishedPartsError if it is only to conclude and shards are missing;
    VersionMismatchError if other parts had another version of int8cli; ShardsRemovedError if shards were pushed and are
    not here any more.
    """
    require_something_to_quantize(survey, settings)
    store = RecordStore(options.output, part.token)
    work = _Part(part, source, survey, describe(source, survey, settings), options, store, progress)
    destination = options.destination
    with (
        shared(options.output, store.own) as lock,
        nullcontext() if destination is None else closing(destination),
    ):
        store.refuse_links()
        refuse_other_versions(store.unfinished.parts, part.version)
        store.check_beside_others(work.conversion)
        with joined(options.output, store.unfinished.parts, part.token, part.record):
            records = work.run(lock, columns or NoColumns(), render_card)
    if not work.missing(records):
        _remove_state(options.output, store)
    return work.outcome(records)


@dataclass(frozen=True, slots=True)
class _Part:
    """The steps of a part."""

    part: PartRun
    source: Source
    survey: Survey
    conversion: Conversion
    options: ConversionRun
    store: RecordStore
    progress: Progress

    def run(self, lock: int, columns: ColumnSource, render_card: RenderCard) -> Records:
        """Convert and, if nothing is missing then, conclude. Returns the records of all that is finished."""
        try:
            finished = self._begin()  # what the destination refuses is an error, whatever others have finished
            return self._run(finished, lock, columns, render_card)
        finally:
            self.store.unfinished.remove_partial_files()

    def _run(self, finished: Collection[str], lock: int, columns: ColumnSource, render_card: RenderCard) -> Records:
        try:
            self.store.claim_beside_others(self.conversion)
            self._convert_own(finished, lock, columns)
            records = self._finished_by_all()
            if not self.missing(records):
                self._conclude(records, render_card)
            return records
        except SettingsMismatchError:  # what others have finished is not what was wanted here
            raise
        except Int8cliError as error:
            if not self._concluded_by_others(error):
                raise
            self._hand_on()
            return self._finished()

    def missing(self, records: Records) -> tuple[str, ...]:
        """The source files without a record."""
        return tuple(shard.file for shard in self.conversion.shards if shard.file not in records)

    def outcome(self, records: Records) -> PartOutcome:
        """Raises UnfinishedPartsError for a process that was only to conclude."""
        missing = self.missing(records)
        if not missing:
            report = conversion_report(self.survey, self.conversion, self._in_order(records))
            return PartOutcome(report, (), self._to_publish)
        if self.part.share is None:
            raise _unfinished(missing, len(self.conversion.shards))
        mine = self.part.shards(self.survey)
        own = conversion_report(self.survey.only(mine), self.conversion, [records[name] for name in mine])
        return PartOutcome(own, missing, self._to_publish)

    @property
    def _to_publish(self) -> bool:
        return self.options.destination is not None and self.part.share is not None

    @property
    def _mine(self) -> list[ShardSource]:
        """The shards of this part; none for a process that only concludes."""
        mine = self.part.shards(self.survey)
        return [shard for shard in self.conversion.shards if shard.file in mine]

    def _begin(self) -> Collection[str]:
        """Begin with the destination. Returns the source files that are finished, of the part's or of all.

        While shards are missing, a process that only concludes uploads none: the parts that still run do.
        """
        shards: Collection[ShardSource] = self.conversion.shards if self.part.share is None else self._mine
        if self.part.share is None and self.missing(self._finished_by_all()):
            shards = [shard for shard in shards if self.store.uploaded(shard) is not None]
        return finished_records(self.store, self.conversion, shards, self.options.destination)

    def _convert_own(self, finished: Collection[str], lock: int, columns: ColumnSource) -> None:
        """Convert the shards of the part that are not finished, and wait until the destination has all."""
        mine = self._mine
        remaining = [shard for shard in mine if shard.file not in finished]
        if mine:
            require_room(self.source, self.survey, self.options.at_once, remaining, self.store)
            remove_useless_downloads(self.source, self.survey, self.options.at_once, remaining, self.store)
            survey = self.survey.only(self.part.shards(self.survey))
            begin_conversion(self.progress, survey, finished, self.options.about_columns)
            self._convert(remaining, lock, columns)
            self.progress.done(TASK)
        if self.options.destination is not None:
            self.options.destination.settle()

    def _convert(self, remaining: Sequence[ShardSource], lock: int, columns: ColumnSource) -> None:
        room = partial(require_room_to_run, self.source, self.survey, self.options.at_once, remaining, self.store)
        settings = self.conversion.settings
        executor = executor_for(self.options, len(remaining), lock, self.progress)
        try:
            tasks = [task_of(shard, self.survey, settings, self.options, self.store) for shard in remaining]
            here = [shard.file for shard in remaining if not self.source.transfers(shard.file)]  # not to download twice
            columns.expect(here, lambda task: executor.submit(task).result())
            recorded = {}
            if self.survey.smooth and tasks:
                recorded = recorded_exponents(self.options.output, self._finished().values())
            destination = self.options.destination
            on_record = ignore if destination is None else destination.add
            loop = ShardLoop(self.source, tasks, executor, self.store, self.progress, columns, recorded, on_record)
            loop.run(room)
        finally:
            executor.close()

    def _finished(self) -> Records:
        """The records of all shards that are finished, by any process: they are here, or where they are pushed to."""
        pushes = self.options.destination is not None
        found = {}
        for shard in self.conversion.shards:
            record = self.store.finished(shard)
            if record is None and pushes and self.store.uploaded(shard) is not None:
                record = self.store.record(shard)
            if record is not None:
                found[shard.file] = record
        return found

    def _finished_by_all(self) -> Records:
        """The same, with what other machines have just finished and this one does not see yet."""

        def shown() -> bool:
            missing = self.missing(self._finished())
            shards = (shard for shard in self.conversion.shards if shard.file in missing)
            return not shown_late(path for shard in shards for path in self.store.paths_of(shard))

        comes_true(shown)
        return self._finished()

    def _in_order(self, records: Records) -> list[ShardRecord]:
        return [records[shard.file] for shard in self.conversion.shards]

    def _conclude(self, records: Records, render_card: RenderCard) -> None:
        output, aside = self.options.output, self.store.unfinished.aside
        copy_files(self.source, self.survey, output, aside)
        write_conclusion(self.survey, self.conversion, self._in_order(records), output, render_card, aside)
        if self.options.destination is not None and self.part.share is None:
            self.options.destination.publish(self.conversion, records)

    def _concluded_by_others(self, error: Int8cliError) -> bool:
        """Whether another process has finished everything: what this one failed at is not needed any more.

        It may have removed what this one was writing, and this machine may see late why. Never where this one
        publishes: nobody else does.
        """
        if self.options.destination is not None and self.part.share is None:
            return False
        removed = (
            isinstance(error.__cause__, FileNotFoundError) and not self.store.unfinished.partial_directory.exists()
        )
        return comes_true(self._is_concluded) if removed else self._is_concluded()

    def _is_concluded(self) -> bool:
        return not self.missing(self._finished()) and is_concluded(self.options.output, self.conversion)

    def _hand_on(self) -> None:
        """Hand on the shards of this part that others have converted in its place, and wait for the destination."""
        if self.options.destination is None:
            return
        for shard in self._mine:
            if self.store.uploaded(shard) is None and (record := self.store.finished(shard)) is not None:
                self.options.destination.add(record)
        self.options.destination.settle()


def _remove_state(output: Path, store: RecordStore) -> None:
    """Remove what resuming would need, unless another process is here: the last one does it.

    On a disk without locks nobody knows who is the last. A process that loses its unfinished files to this one finds
    that the conversion is finished, and ends.
    """
    try:
        with locked(output, store.own):
            store.unfinished.remove_state()
    except CannotLockError:
        store.unfinished.remove_state()
    except OutputInUseError:
        return


def _unfinished(missing: Sequence[str], shards: int) -> UnfinishedPartsError:
    names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
    return UnfinishedPartsError(
        f"{len(missing)} of {counted(shards, 'shard')} are not converted: {names}",
        hint="Run the parts that have not ended, or have failed, again: they convert only what is missing.",
    )
