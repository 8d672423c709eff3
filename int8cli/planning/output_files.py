"""What each output shard will hold, to the byte, before anything is written.

Owns the names of output files and the size of an output. Takes the plan and a layout; reads and writes nothing and
needs no torch, so that `--dry-run` and `estimate-memory` count with the same code that `convert` writes with.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from int8cli.checkpoint.header import encode_header
from int8cli.checkpoint.output_names import OWN_DIRECTORY, refuse_shared_outputs
from int8cli.checkpoint.tensor import ShardContents, StoredTensor, TensorSpec
from int8cli.planning.layouts import Layout, bitsandbytes
from int8cli.planning.plan import Decision

CARD_FILE = "README.md"
REPORT_FILE = f"{OWN_DIRECTORY}/report.json"
SIDECAR_DIRECTORY = f"{OWN_DIRECTORY}/outliers"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_SHARD_NAME = "model.safetensors"  # the one name that loaders look for where there is no index


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One file to be written: its encoded header, and the place of each tensor in it."""

    file_name: str
    header: bytes
    tensors: dict[str, StoredTensor]

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.tensor_bytes

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())


def output_file_names(source_files: Sequence[str], copied: Sequence[str] = ()) -> dict[str, str]:
    """The output's name for each source shard: its own, as .safetensors; a lone shard gets the name loaders expect.

    Raises IndexFileError where two would have one name, that of a `copied` file included, or one would lie in our own
    directory.
    """
    if len(source_files) == 1:
        names = {source_files[0]: SINGLE_SHARD_NAME}
    else:
        names = {name: str(PurePosixPath(name).with_suffix(".safetensors")) for name in source_files}
    refuse_shared_outputs(names, copied)
    return names


def plan_output_shard(
    contents: ShardContents, decisions: Mapping[str, Decision], file_name: str, target: Layout = bitsandbytes
) -> OutputShard:
    """Lay out the file that one source shard becomes in `target`. `decisions` are the plan's, by tensor name."""
    specs = [spec for stored in contents.tensors for spec in output_specs(decisions[stored.spec.name], target)]
    header, places = encode_header(specs, _metadata(contents))
    return OutputShard(file_name, header, {place.spec.name: place for place in places})


def output_specs(decision: Decision, target: Layout = bitsandbytes) -> Iterator[TensorSpec]:
    """What the output holds for one source tensor."""
    if decision.quantize:
        yield from target.quantized_specs(decision.spec, transpose=decision.transpose)
    else:
        yield replace(decision.spec, dtype=decision.written_dtype)


def sidecar_file_name(output_file: str) -> str:
    """Where the stored columns of an output shard's linears lie."""
    return f"{SIDECAR_DIRECTORY}/{output_file}"


def plan_sidecar(
    contents: ShardContents, decisions: Mapping[str, Decision], file_name: str, counts: Mapping[str, int]
) -> OutputShard | None:
    """Lay out the sidecar of an output shard; None where nothing in it is quantized.

    For each quantized X `X.outlier_cols` int32 (k,) and `X.outlier_weight` (out_features, k) in the source's dtype,
    with k = `counts` by tensor name, 0 where it has none.
    """
    quantized = [decision for stored in contents.tensors if (decision := decisions[stored.spec.name]).quantize]
    if not quantized:
        return None
    specs = [spec for each in quantized for spec in sidecar_specs(each, counts.get(each.spec.name, 0))]
    header, places = encode_header(specs, {"format": "pt"})
    return OutputShard(sidecar_file_name(file_name), header, {place.spec.name: place for place in places})


def sidecar_specs(decision: Decision, count: int) -> tuple[TensorSpec, TensorSpec]:
    """The indices and the exact columns of one linear, `count` of them."""
    out_features = decision.spec.shape[1] if decision.transpose else decision.spec.shape[0]
    return stored_specs(decision.module, decision.spec.dtype, out_features, count)


def sidecar_bytes(decision: Decision, count: int) -> int:
    """What both of a linear's sidecar tensors take."""
    return sum(spec.nbytes for spec in sidecar_specs(decision, count))


def stored_specs(module: str, dtype: str, out_features: int, count: int) -> tuple[TensorSpec, TensorSpec]:
    """What a sidecar holds of a linear whose source weight has this dtype."""
    return (
        TensorSpec(outlier_cols_name(module), "I32", (count,)),
        TensorSpec(outlier_weight_name(module), dtype, (out_features, count)),
    )


def outlier_cols_name(module: str) -> str:
    return f"{module}.outlier_cols"


def outlier_weight_name(module: str) -> str:
    return f"{module}.outlier_weight"


def _metadata(contents: ShardContents) -> dict[str, str]:
    # transformers refuses a shard whose metadata does not name a framework.
    return {**contents.metadata, "format": "pt"}
