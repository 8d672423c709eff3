"""The plan that a task takes to the process that converts: the files of one shard, to the byte."""

import pickle
from pathlib import Path

from support.checkpoints import survey
from support.program import llama

from int8cli.checkpoint.tensor import DTYPE_BITS, TORCH_NAMES
from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES
from int8cli.planning.planned_shard import PlannedShard, plan_shard

FILE = "model-00001-of-00003.safetensors"


def planned(directory: Path, columns: dict[str, tuple[int, ...]] | None = None) -> PlannedShard:
    found = survey(llama(directory / "model"))
    shard = found.planned(FILE)
    assert shard.files == (found.outputs[FILE],)
    return plan_shard(shard.contents, shard.plan, FILE, shard.target, columns)


def test_a_planned_shard_can_be_sent_to_another_process(tmp_path: Path) -> None:
    shard = planned(tmp_path, {})
    assert pickle.loads(pickle.dumps(shard)) == shard


def test_columns_go_into_a_planned_sidecar(tmp_path: Path) -> None:
    first = next(iter(planned(tmp_path).plan.quantized)).spec.name
    shard = planned(tmp_path, {}).with_columns({first: (3, 5)})
    assert shard.sidecar is not None
    assert shard.sidecar.tensors[first.replace(".weight", ".outlier_cols")].spec.shape == (2,)
    without = planned(tmp_path)
    assert without.with_columns({first: (3, 5)}) is without


def test_a_shard_without_quantized_linears_has_no_sidecar(tmp_path: Path) -> None:
    shard = planned(tmp_path, {})
    linears = [decision.spec.name for decision in shard.plan.quantized]
    one = shard.with_columns(dict.fromkeys(linears, (0,))).with_copied(linears[:1])
    assert one.sidecar is not None
    assert set(one.columns) == set(linears[1:])
    assert one.output.tensors[linears[0]].spec.dtype == "BF16"
    everything = shard.with_copied(linears)
    assert (everything.sidecar, everything.columns) == (None, {})
    assert everything.tensor_bytes == everything.output.tensor_bytes


def test_every_dtype_has_its_width_in_torch() -> None:
    assert set(DTYPE_BITS) - set(TORCH_NAMES) == {"F4", "F6_E2M3", "F6_E3M2"}
    assert {name: dtype.itemsize * 8 for name, dtype in TORCH_DTYPES.items()} == {
        name: bits for name, bits in DTYPE_BITS.items() if name in TORCH_DTYPES
    }
