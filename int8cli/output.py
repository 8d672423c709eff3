"""What each output shard will hold, to the byte, before anything is written.

Owns the names of output files and the size of an output. Takes the plan and a layout; reads and writes nothing and
needs no torch, so that `--dry-run` and `estimate-memory` count with the same code that `convert` writes with.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from int8cli.checkpoint.header import encode_header
from int8cli.checkpoint.tensor import ShardLayout, StoredTensor, TensorSpec
from int8cli.layouts import Layout, bitsandbytes
from int8cli.plan import Decision

CARD_FILE = "README.md"
REPORT_FILE = "int8/report.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_SHARD_NAME = "model.safetensors"  # the one name that loaders look for where there is no index


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One file to be written: its encoded header, the place of each tensor in it, and the layout it is in."""

    file_name: str
    header: bytes
    tensors: dict[str, StoredTensor]
    target: Layout = bitsandbytes

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.tensor_bytes

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())


def output_file_names(source_files: Sequence[str]) -> dict[str, str]:
    """The output's name for each source shard: its own, as .safetensors; a lone shard gets the name loaders expect."""
    if len(source_files) == 1:
        return {source_files[0]: SINGLE_SHARD_NAME}
    return {name: str(PurePosixPath(name).with_suffix(".safetensors")) for name in source_files}


def plan_output_shard(
    layout: ShardLayout, decisions: Mapping[str, Decision], file_name: str, target: Layout = bitsandbytes
) -> OutputShard:
    """Lay out the file that one source shard becomes in `target`. `decisions` are the plan's, by tensor name."""
    specs = [spec for stored in layout.tensors for spec in output_specs(decisions[stored.spec.name], target)]
    header, places = encode_header(specs, _metadata(layout))
    return OutputShard(file_name, header, {place.spec.name: place for place in places}, target)


def output_specs(decision: Decision, target: Layout = bitsandbytes) -> Iterator[TensorSpec]:
    """What the output holds for one source tensor."""
    if decision.quantize:
        yield from target.quantized_specs(decision.spec, transpose=decision.transpose)
    else:
        yield replace(decision.spec, dtype=decision.written_dtype)


def _metadata(layout: ShardLayout) -> dict[str, str]:
    # transformers refuses a shard whose metadata does not name a framework.
    return {**layout.metadata, "format": "pt"}
