"""What a pass adds up: digests, errors and non-finite values, in file order.

Owns every figure that a pass finds, so that they do not depend on how many threads it has. Writes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from int8cli.checkpoint.digest import SourceDigest, new_digest
from int8cli.conversion.block_bytes import BlockBytes, NonFiniteValue
from int8cli.errors import NonFiniteError
from int8cli.llm_int8.metrics import ErrorSums
from int8cli.planning.planned_shard import PlannedShard


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass saw: the errors, where they were asked for, and the digests of what it wrote, by tensor.

    `non_finite` names weights that must be kept; with any, the written file is not the result. `source_sha256`, in
    hex, is that of the whole source file, where it was asked for.
    """

    sums: Mapping[str, ErrorSums]
    digests: Mapping[str, str]
    non_finite: Mapping[str, NonFiniteValue]
    source_sha256: str | None


class PassLedger:
    """The sums and digests of one pass so far. To be called from one thread at a time, with blocks in file order.

    `source_digest`, if any, is given every run of the source's bytes as it passes.
    """

    def __init__(
        self, planned: PlannedShard, *, keep_non_finite: bool, source_digest: SourceDigest | None = None
    ) -> None:
        self._contents = planned.contents
        self._keep_non_finite = keep_non_finite
        self._source_digest = source_digest
        self._digests = {name: new_digest() for file in planned.files for name in file.tensors}
        self._sums: dict[str, ErrorSums] = {}
        self._non_finite: dict[str, NonFiniteValue] = {}

    def add(self, block: BlockBytes) -> None:
        """Record the result of a block. Raises NonFiniteError unless non-finite weights stay in their dtype."""
        if block.non_finite is not None:
            if not self._keep_non_finite:
                raise _non_finite_error(self._contents.file_name, block.name, block.non_finite)
            self._non_finite.setdefault(block.name, block.non_finite)
        if block.sums is not None:
            self._sums[block.name] = self._sums.get(block.name, ErrorSums()) + block.sums
        for name, _, data in block.outputs:
            self._digests[name].update(data)
        # What is not mappable was read whole, in another order than the file's: its digest is taken at the end.
        if self._source_digest is not None and block.source is not None and self._contents.mappable:
            self._source_digest.update(*block.source)

    def add_constant(self, name: str, data: bytes) -> None:
        """Take down an output tensor that comes out of no block."""
        self._digests[name].update(data)

    def is_non_finite(self, name: str) -> bool:
        """Whether a tensor is known to be kept; of any thread's asking."""
        return name in self._non_finite

    def result(self) -> PassResult:
        """What the pass found, once all is added; reads what of the source has not passed."""
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        sha256 = self._source_digest.hexdigest() if self._source_digest is not None else None
        return PassResult(self._sums, digests, self._non_finite, sha256)


def _non_finite_error(file_name: str, tensor: str, place: NonFiniteValue) -> NonFiniteError:
    return NonFiniteError(
        f"{file_name}: {tensor} holds {place}",
        hint="The checkpoint is damaged there. Such a tensor can stay in its source dtype.",
    )
