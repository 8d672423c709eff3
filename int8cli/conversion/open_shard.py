"""A source shard on this machine, opened to be converted or compared. Both make the same pass over it.

Owns the check that it is the planned file, and the digest of the whole file.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial

from int8cli.checkpoint.digest import SourceDigest
from int8cli.checkpoint.disk import reading_errors
from int8cli.checkpoint.pickled import load_legacy
from int8cli.checkpoint.reader import FileReader, ShardReader, TensorsReader, open_to_read
from int8cli.checkpoint.source import LocalFile
from int8cli.checkpoint.weight_files import read_contents
from int8cli.conversion.pass_ledger import PassResult
from int8cli.conversion.shard_pass import ShardPass, Sink
from int8cli.conversion.task import PassOptions, ShardTask
from int8cli.errors import DigestMismatchError
from int8cli.planning.planned_shard import PlannedShard
from int8cli.workers.processes import OnBytes


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A shard's file, and access to its bytes."""

    file_name: str
    local: LocalFile
    reader: ShardReader

    def run_pass(
        self, planned: PlannedShard, options: PassOptions, sinks: Sequence[Sink], on_bytes: OnBytes
    ) -> PassResult:
        """Give the bytes of the planned files to `sinks`, one sink per file.

        If the Hub published a digest of the source, the result has the computed digest, and the caller must compare
        the two. Raises NonFiniteError, CorruptShardError, OutputError.
        """
        with ExitStack() as stack:
            digest = None
            if self.local.sha256 is not None:
                gaps = stack.enter_context(closing(FileReader(self.local.path)))
                digest = SourceDigest(gaps, planned.contents.file_bytes)
            result = ShardPass(planned, self.reader, options, sinks, partial(on_bytes, self.file_name)).run(digest)
            self.local.require_unchanged(self.file_name)
            return result


@contextmanager
def open_shard(task: ShardTask, local: LocalFile) -> Iterator[OpenShard]:
    """Open the shard of a task. Raises DigestMismatchError if its header differs from the one in the plan."""
    with closing(_open_reader(task, local)) as reader:
        yield OpenShard(task.source.file, local, reader)


def _open_reader(task: ShardTask, local: LocalFile) -> ShardReader:
    contents = task.planned.contents.as_in_file()
    changed = f"{contents.file_name}: changed since its header was read"
    local.require_unchanged(contents.file_name)
    with reading_errors(local.path, contents.file_name):
        size_bytes = local.path.stat().st_size
    if size_bytes != contents.file_bytes:
        raise DigestMismatchError(changed, hint="Run the same command again.")
    if not contents.mappable:
        tensors = load_legacy(local.path)
        return TensorsReader([tensors[stored.spec.name] for stored in contents.tensors])
    with open_to_read(local.path, contents.file_name) as file:
        if read_contents(file, task.weight_format, contents.file_name, contents.file_bytes) != contents:
            raise DigestMismatchError(changed, hint="Run the same command again.")
    return FileReader(local.path)
