"""The figures of a pass: digests, errors and non-finite values, added up in file order.

Owns every figure of a pass, so that none depends on the number of threads. Writes nothing.
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
    """The result of a pass: errors (if they were measured) and digests of the written tensors, by tensor.

    `non_finite` has the weights that must stay in their dtype. If there are any, the written files must be discarded.
    `source_sha256` is that of the whole source file, in hex, if it was requested.
    """

    sums: Mapping[str, ErrorSums]
    digests: Mapping[str, str]
    non_finite: Mapping[str, NonFiniteValue]
    source_sha256: str | None


class PassLedger:
    """The sums and digests of one pass so far. Call it from one thread at a time, with blocks in file order.

    `source_digest`, if any, receives the bytes of the source as they are read.
    """

    def __init__(
        self, planned: PlannedShard, *, keep_non_finite: bool, source_digest: SourceDigest | None = None
    ) -> None:
        self._contents = planned.contents
        self._keep_non_finite, self._scaled = keep_non_finite, planned.exponents
        self._source_digest = source_digest
        self._digests = {name: new_digest() for file in planned.files for name in file.tensors}
        self._sums: dict[str, ErrorSums] = {}
        self._non_finite: dict[str, NonFiniteValue] = {}

    def add(self, block: BlockBytes) -> None:
        """Record the result of a block. Raises NonFiniteError unless non-finite weights stay in their dtype."""
        if block.non_finite is not None:
            if not self._keep_non_finite or block.name in self._scaled:
                raise _non_finite_error(self._contents.file_name, block.name, block.non_finite)
            self._non_finite.setdefault(block.name, block.non_finite)
        if block.sums is not None:
            self._sums[block.name] = self._sums.get(block.name, ErrorSums()) + block.sums
        for name, _, data in block.outputs:
            self._digests[name].update(data)
        # A file that is not mappable was read whole, not in file order: its digest is computed at the end.
        if self._source_digest is not None and block.source is not None and self._contents.mappable:
            self._source_digest.update(*block.source)

    def add_constant(self, name: str, data: bytes) -> None:
        """Add an output tensor that no block produces."""
        self._digests[name].update(data)

    def is_non_finite(self, name: str) -> bool:
        """Whether a tensor is known to contain a non-finite value. May be called from any thread."""
        return name in self._non_finite

    def result(self) -> PassResult:
        """The result, after everything has been added. Reads the parts of the source that the pass did not read."""
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        sha256 = self._source_digest.hexdigest() if self._source_digest is not None else None
        return PassResult(self._sums, digests, self._non_finite, sha256)


def _non_finite_error(file_name: str, tensor: str, place: NonFiniteValue) -> NonFiniteError:
    return NonFiniteError(
        f"{file_name}: {tensor} contains {place}",
        hint="The checkpoint is damaged there. Such a tensor can stay a float.",
    )
