"""A checkpoint's tensors by name, read on demand, with only the needed shards on this machine.

Owns which shards are on this machine at a time, and how a stored tensor becomes a torch tensor. Knows no model.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType

from torch import Tensor

from int8cli.checkpoint.borrowed import with_borrowed
from int8cli.checkpoint.digest import require_published, sha256_of
from int8cli.checkpoint.shard_tensors import ShardTensors
from int8cli.checkpoint.source import LocalFile, ShardFile, Source
from int8cli.checkpoint.tensor import ShardContents, TensorSpec
from int8cli.checkpoint.writer import bytes_on_disk


class _OpenShard:
    """A shard that is on this machine and open while tensors are read from it.

    If the Hub published its sha256, that is checked before anything is read: a later check could not undo what a model
    has computed from it.
    """

    def __init__(self, source: Source, contents: ShardContents) -> None:
        with ExitStack() as stack:
            self.local = stack.enter_context(_fetched_as_published(source, contents))
            self.tensors = ShardTensors(self.local.path, with_borrowed(source, contents))
            stack.callback(self.tensors.close)
            self._stack = stack.pop_all()

    def __enter__(self) -> "_OpenShard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it. A fetched copy is removed, but after an error it stays for the next run."""
        self._stack.__exit__(kind, error, traceback)


@contextmanager
def _fetched_as_published(source: Source, contents: ShardContents) -> Iterator[LocalFile]:
    """A shard, fetched again if its digest differs from the Hub's. Raises DigestMismatchError if it still differs."""
    with ExitStack() as stack:
        local = stack.enter_context(source.fetch(contents.file_name))
        if _sha256_of(local) != local.sha256:
            source.discard(contents.file_name)
            local = stack.enter_context(source.fetch(contents.file_name))
            require_published(contents.file_name, local, _sha256_of(local))
        yield local


def _sha256_of(local: LocalFile) -> str | None:
    """The digest of the file; None if there is no published one to compare with."""
    return sha256_of(local.path) if local.sha256 is not None else None


class CheckpointTensors:
    """Reads tensors of a source. Close it, or use it as a context manager.

    `expect` announces which tensors will be read. A shard is closed, and its copy from the Hub removed, once none of
    them is left in it. If the context ends with an error, the copies of open shards stay for the next run.
    """

    def __init__(self, source: Source, shards: Sequence[ShardContents]) -> None:
        self._source = source
        self._shards = {contents.file_name: contents for contents in shards}
        self._places = {
            stored.spec.name: (contents.file_name, stored) for contents in shards for stored in contents.tensors
        }
        self._open: dict[str, _OpenShard] = {}
        self._opening = threading.Lock()
        self._expected: Counter[str] = Counter()  # by shard

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: stored.spec for name, (_, stored) in self._places.items()}

    def expect(self, names: Iterable[str]) -> None:
        """Announce that these tensors will be read, as often as they are named."""
        self._expected.update(self._places[name][0] for name in names)

    def prefetch(self, names: Iterable[str]) -> None:
        """Start to fetch the shards of these tensors in the background."""
        for shard in dict.fromkeys(self._places[name][0] for name in names):
            if shard not in self._open:
                self._source.prefetch(shard)

    def read(self, name: str) -> Tensor:
        """A contiguous copy of the tensor in memory. Raises CorruptShardError, SourceError, CheckpointError."""
        return self._shard(name).read(name)

    def map(self, name: str) -> Tensor:
        """The tensor as a mapping of its file: only the parts that are read use memory. Do not write to it."""
        return self._shard(name).map(name)

    def read_ahead(self, name: str) -> None:
        """Have the system start to read a tensor into the page cache."""
        self._shard(name).read_ahead(name)

    def forget(self, name: str) -> None:
        """Have the system drop a tensor from its page cache."""
        self._shard(name).forget(name)

    def row_blocks(self, name: str, elements: int) -> Iterator[Tensor]:
        """A matrix in blocks of whole rows with about `elements` elements. A block may reuse the memory of the last."""
        return self._shard(name).row_blocks(name, elements)

    def release(self, names: Iterable[str]) -> None:
        """End the use of these tensors, as often as they are named. Closes shards without expected tensors."""
        for _ in self.finished(names):
            pass

    def finished(self, names: Iterable[str]) -> Iterator[ShardFile]:
        """As `release`, but yields each shard before it is closed. Its file exists until the generator is resumed.

        If the generator is ended early (`close`, `throw`), the fetched copy of that shard stays for the next run.
        """
        shards = Counter(self._places[name][0] for name in names)
        self._expected.subtract(shards)
        for name in shards:
            if self._expected[name] <= 0 and name in self._open:
                with self._open.pop(name) as shard:
                    yield ShardFile(name, shard.local)

    def added_shard_bytes(self, steps: Sequence[Sequence[str]]) -> int:
        """The most bytes of fetched shards beside what is on the disk now, if tensors are read in these steps.

        The next step is fetched while one is read. Shards that are on this machine anyway do not count. A download that
        an earlier run has begun takes only its rest, and what there is of it goes with its shard: not before, and never
        if no step reads the shard.
        """
        reads = [{self._places[name][0] for name in step} for step in steps]
        last = {shard: place for place, shards in enumerate(reads) for shard in shards}
        fetched = [shard for shard in last if self._source.transfers(shard)]
        begun = {shard: bytes_on_disk(self._source.downloads(shard)) for shard in fetched}
        rest = {shard: max(0, self._shards[shard].file_bytes - begun[shard]) for shard in fetched}
        most = gone_bytes = 0
        present = set[str]()
        for place, shards in enumerate(reads):
            present |= shards | (reads[place + 1] if place + 1 < len(reads) else set())
            most = max(most, sum(rest.get(shard, 0) for shard in present) - gone_bytes)
            read = {shard for shard in present if last[shard] == place}
            gone_bytes += sum(begun.get(shard, 0) for shard in read)
            present -= read
        return most

    def close(self) -> None:
        self.__exit__(None, None, None)

    def __enter__(self) -> "CheckpointTensors":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shards = ExitStack()
        while self._open:
            shards.push(self._open.popitem()[1])
        shards.__exit__(kind, error, traceback)

    def _shard(self, name: str) -> ShardTensors:
        shard = self._places[name][0]
        with self._opening:  # transformers reads a unit's tensors from several threads
            if shard not in self._open:
                self._open[shard] = _OpenShard(self._source, self._shards[shard])
            return self._open[shard].tensors
