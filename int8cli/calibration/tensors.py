"""A checkpoint's tensors by name, read from its shards when asked for, with no more shards held than needed.

Owns which shards are on this machine at a time and how a stored tensor becomes one of torch. Knows no model.
"""

import mmap
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from int8cli.checkpoint.pickled import load_legacy
from int8cli.checkpoint.reader import FileReader
from int8cli.checkpoint.source import Source
from int8cli.checkpoint.tensor import ShardLayout, StoredTensor, TensorSpec
from int8cli.errors import CheckpointError

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class CheckpointTensors:
    """Reads tensors of a source. Close it, or use it as a context manager.

    `expect` says which tensors are still wanted; a shard is let go (and one from the Hub removed) once none of its are.
    """

    def __init__(self, source: Source, layouts: Sequence[ShardLayout]) -> None:
        self._source = source
        self._layouts = {layout.file_name: layout for layout in layouts}
        self._places = {stored.spec.name: (layout.file_name, stored) for layout in layouts for stored in layout.tensors}
        self._open: dict[str, _OpenShard] = {}
        self._opening = threading.Lock()
        self._wanted: Counter[str] = Counter()

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: stored.spec for name, (_, stored) in self._places.items()}

    def expect(self, names: Iterable[str]) -> None:
        """Count on these tensors being read, once for each time they are named."""
        self._wanted.update(self._places[name][0] for name in names)

    def prefetch(self, names: Iterable[str]) -> None:
        """Start to bring here what these tensors lie in."""
        for shard in dict.fromkeys(self._places[name][0] for name in names):
            if shard not in self._open:
                self._source.prefetch(shard)

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own, contiguous. Raises CorruptShardError, SourceError, CheckpointError."""
        return self._shard(name).read(self._places[name][1])

    def map(self, name: str) -> Tensor:
        """The tensor as a mapping of its file: what is never touched never enters memory. Not to be written to."""
        return self._shard(name).map(self._places[name][1])

    def release(self, names: Iterable[str]) -> None:
        """Done with these tensors, as often as they are named: let go of shards that nothing else is expected from."""
        shards = Counter(self._places[name][0] for name in names)
        self._wanted.subtract(shards)
        for shard in shards:
            if self._wanted[shard] <= 0 and shard in self._open:
                self._open.pop(shard).close()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> "CheckpointTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shard(self, name: str) -> "_OpenShard":
        shard = self._places[name][0]
        with self._opening:  # transformers reads a unit's tensors from several threads
            if shard not in self._open:
                self._open[shard] = _OpenShard(self._source, self._layouts[shard])
            return self._open[shard]


class _OpenShard:
    """A shard on this machine, open for as long as tensors are read from it."""

    def __init__(self, source: Source, layout: ShardLayout) -> None:
        self._stack = ExitStack()
        self._path: Path = self._stack.enter_context(source.fetch(layout.file_name)).path
        self._legacy: dict[str, Tensor] | None = None
        try:
            if layout.mappable:
                self._reader = FileReader(self._path)
                self._stack.callback(self._reader.close)
            else:
                self._legacy = load_legacy(self._path)
        except BaseException:
            self._stack.close()
            raise

    def read(self, stored: StoredTensor) -> Tensor:
        if self._legacy is not None:
            return self._legacy[stored.spec.name].contiguous()
        if not stored.spec.nbytes:
            return torch.empty(stored.spec.shape, dtype=_dtype_of(stored))
        memory = bytearray(stored.spec.nbytes)
        self._reader.read_into(stored.offset_bytes, memoryview(memory))
        return _as_stored(torch.frombuffer(memory, dtype=torch.uint8), stored)

    def map(self, stored: StoredTensor) -> Tensor:
        if self._legacy is not None or not stored.spec.nbytes:
            return self.read(stored)
        start = stored.offset_bytes - stored.offset_bytes % mmap.ALLOCATIONGRANULARITY
        with self._path.open("rb") as file:
            # Private, so that torch may take it for writable; pages that are only read are shared with the page cache.
            mapped = mmap.mmap(
                file.fileno(),
                stored.end_bytes - start,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=start,
            )
        memory = torch.frombuffer(
            mapped, dtype=torch.uint8, count=stored.spec.nbytes, offset=stored.offset_bytes - start
        )
        return _as_stored(memory, stored)

    def close(self) -> None:
        self._legacy = None
        self._stack.close()


def _as_stored(memory: Tensor, stored: StoredTensor) -> Tensor:
    """Bytes as the tensor they are."""
    spec, dtype = stored.spec, _dtype_of(stored)
    if memory.data_ptr() % dtype.itemsize:  # a header of odd length, which old writers left
        memory = memory.clone()
    values = memory.view(dtype)
    if stored.column_major:
        return values.view(spec.shape[::-1]).t().contiguous()
    return values.view(spec.shape)


def _dtype_of(stored: StoredTensor) -> torch.dtype:
    if stored.spec.dtype not in _DTYPES:
        raise CheckpointError(f"{stored.spec.name} is {stored.spec.dtype}, a type that no model is run in")
    return _DTYPES[stored.spec.dtype]
