"""The contents of each output file, to the byte, before anything is written.

Owns the names of output files and the size of an output. Reads and writes nothing and needs no torch, so `--dry-run`
and `estimate-memory` compute sizes with the same code that `convert` writes with.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from int8cli.checkpoint.header import encode_header
from int8cli.checkpoint.output_names import OWN_DIRECTORY, refuse_shared_outputs
from int8cli.checkpoint.tensor import ShardContents, StoredTensor, TensorSpec
from int8cli.planning.decisions import Decision
from int8cli.planning.layouts import Layout, bitsandbytes

CARD_FILE = "README.md"
REPORT_FILE = f"{OWN_DIRECTORY}/report.json"
SIDECAR_DIRECTORY = f"{OWN_DIRECTORY}/outliers"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_SHARD_NAME = "model.safetensors"  # the name that loaders look for if there is no index


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One file to write: its encoded header, and the place of each tensor in it."""

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
    """The output's file name for each source shard: its own, with .safetensors. A single one is model.safetensors.

    Raises IndexFileError if two outputs, or an output and a `copied` file, would have the same name, or if one would be
    in our own directory.
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
    """Lay out the output of one source shard in the layout `target`. `decisions` are the plan's, by tensor name."""
    specs = [spec for stored in contents.tensors for spec in output_specs(decisions[stored.spec.name], target)]
    header, places = encode_header(specs, _metadata(contents))
    return OutputShard(file_name, header, {place.spec.name: place for place in places})


def output_specs(decision: Decision, target: Layout = bitsandbytes) -> Iterator[TensorSpec]:
    """The tensors of the output for one source tensor."""
    if decision.quantize:
        yield from target.quantized_specs(decision.spec, transpose=decision.transpose)
    else:
        yield replace(decision.spec, dtype=decision.written_dtype)


def sidecar_file_name(output_file: str) -> str:
    """The name of the sidecar of an output shard."""
    return f"{SIDECAR_DIRECTORY}/{output_file}"


def plan_sidecar(
    contents: ShardContents,
    decisions: Mapping[str, Decision],
    file_name: str,
    counts: Mapping[str, int],
    smoothed: Sequence[TensorSpec] = (),
) -> OutputShard | None:
    """Lay out the sidecar of an output shard; None if nothing in the shard is quantized or smoothed.

    For each quantized X: `X.outlier_cols` int32 (k,) and `X.outlier_weight` (out_features, k) in the source's dtype,
    where k is the tensor's entry in `counts`, or 0. `smoothed` are the tensors for the exponents of a smoothing.
    """
    quantized = [decision for stored in contents.tensors if (decision := decisions[stored.spec.name]).quantize]
    specs = [spec for each in quantized for spec in sidecar_specs(each, counts.get(each.spec.name, 0))]
    specs += smoothed
    if not specs:
        return None
    header, places = encode_header(specs, {"format": "pt"})
    return OutputShard(sidecar_file_name(file_name), header, {place.spec.name: place for place in places})


def sidecar_specs(decision: Decision, count: int) -> tuple[TensorSpec, TensorSpec]:
    """The sidecar's tensors for one linear: the indices and the values of `count` columns."""
    out_features = decision.spec.shape[1] if decision.transpose else decision.spec.shape[0]
    return stored_specs(decision.module, decision.spec.dtype, out_features, count)


def sidecar_bytes(decision: Decision, count: int) -> int:
    """The size of both sidecar tensors of one linear."""
    return sum(spec.nbytes for spec in sidecar_specs(decision, count))


def stored_specs(module: str, dtype: str, out_features: int, count: int) -> tuple[TensorSpec, TensorSpec]:
    """The sidecar's tensors for a linear whose source weight has this dtype."""
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
