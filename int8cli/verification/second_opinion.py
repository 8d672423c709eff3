"""A second opinion on a conversion: its tensors compared with what the method makes of the source, by other code.

Converting again finds what differs from the conversion, and nothing where both are wrong alike. Here the source is read
by its own header, quantized by the definition of the method, and compared with the files bit for bit: int8 data,
scales, stored columns, floats. Nothing of `conversion` or `llm_int8` takes part, except that 8-bit floats with scales,
and pickled files, are read as the conversion reads them.

Of a large tensor, some rows are compared, spread over the whole.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8cli.checkpoint.tensor import StoredTensor
from int8cli.conversion.open_shard import OpenShard
from int8cli.conversion.task import ShardTask
from int8cli.records.conversion import VIA_FLOAT16, Conversion
from int8cli.records.shard_record import ShardRecord
from int8cli.results.verification import Failure
from int8cli.verification.float_copies import copy_problem
from int8cli.verification.int8_layer import Conditions, Int8Layer
from int8cli.verification.source_rows import (
    FloatRows,
    block_of,
    orders_by_block,
    reading_as_converted,
    readings,
    workbench,
)
from int8cli.verification.tensor_file import TensorFile
from int8cli.workers.torch_threads import torch_threads

_BITSANDBYTES = "bitsandbytes"
# By all names that torch has for them: a config may have any.
_MODEL_DTYPES = {"float16": "F16", "half": "F16", "bfloat16": "BF16", "float32": "F32", "float": "F32"}


@dataclass(slots=True)
class Opinion:
    """How many layers and copied tensors were compared, and how they differ."""

    layers: int = 0
    copied: int = 0
    failures: list[Failure] = field(default_factory=list)

    def add(self, other: "Opinion") -> None:
        self.layers += other.layers
        self.copied += other.copied
        self.failures += other.failures


class SecondOpinion:
    """Judges the shards of one conversion. `config` is the source's config.json."""

    def __init__(
        self, directory: Path, conversion: Conversion, records: Collection[ShardRecord], config: Mapping[str, Any]
    ) -> None:
        self._directory = directory
        as_on_load = conversion.settings.layout == _BITSANDBYTES
        self._conditions = Conditions(
            float32_via_half=conversion.settings.float32 == VIA_FLOAT16,
            cast_to_bfloat16=as_on_load and _dtype_of(config, records) == "BF16",
        )
        self._turned = orders_by_block(records)

    def of(self, task: ShardTask, record: ShardRecord, shard: OpenShard) -> Opinion:
        """Compare the layers and floats of one shard. Raises the errors of reading it or the output."""
        with torch_threads(1), ExitStack() as opened:
            names = [file.file_name for file in task.planned.files]
            output, *beside = (opened.enter_context(TensorFile(self._directory / name)) for name in names)
            sidecar = beside[0] if beside else None
            source = None
            if task.weight_format == "safetensors":
                source = opened.enter_context(TensorFile(shard.local.path))
            return self._compare(task, record, shard, source, output, sidecar)

    def _compare(
        self,
        task: ShardTask,
        record: ShardRecord,
        shard: OpenShard,
        source: TensorFile | None,
        output: TensorFile,
        sidecar: TensorFile | None,
    ) -> Opinion:
        found = Opinion()
        tensors = {stored.spec.name: stored for stored in task.planned.contents.tensors}
        bench = None
        for layer in record.layers:
            stored = tensors.pop(f"{layer.name}.weight", None)
            if stored is None:
                continue  # the check of the tensors says so
            ways: list[FloatRows] = []
            if source is not None and stored.scaled is None:
                ways = readings(source, stored, layer.shape, turned=self._turned.get(block_of(layer.name)))
            else:
                bench = bench or workbench(task, shard)
                ways = [reading_as_converted(task, bench, stored)]
            judged = Int8Layer(layer.name, layer.shape, output, sidecar)
            problems = [judged.problem(way, self._conditions) for way in ways] or ["fits no tensor of the source"]
            found.layers += 1
            if None not in problems:
                found.failures.append(Failure(record.files[0].file, str(problems[0]), layer.name))
        for stored in tensors.values():
            if source is None or stored.scaled is not None:
                continue
            problem = copy_problem(source, _in_file(stored), output, stored.spec.name, sidecar)
            found.copied += 1
            if problem is not None:
                found.failures.append(Failure(record.files[0].file, problem, stored.spec.name))
        return found


def _in_file(stored: StoredTensor) -> str:
    return (stored.whole or stored).spec.name


def _dtype_of(config: Mapping[str, Any], records: Collection[ShardRecord]) -> str | None:
    """The dtype that loaders give the model: the config's or, where it names none, that of most bytes."""
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if named in _MODEL_DTYPES or not config:
        return _MODEL_DTYPES.get(named)
    sizes = Counter[str]()
    for spec in (spec for record in records for spec in record.source_tensors):
        if spec.dtype in _MODEL_DTYPES.values():
            sizes[spec.dtype] += spec.nbytes
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype), default=None)
