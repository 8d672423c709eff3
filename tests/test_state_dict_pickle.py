"""Reading the pickle of a state dict without torch: the same tensors as with torch, and nothing else."""

import io
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.program import environment

from int8cli.checkpoint import pickled
from int8cli.checkpoint.pickled import read_pickled
from int8cli.checkpoint.state_dict_pickle import NotAStateDictError, PickledTensor, read_state_dict
from int8cli.checkpoint.tensor import ShardContents
from int8cli.errors import CheckpointError

WEIGHT = torch.arange(24, dtype=torch.float32).reshape(4, 6)
DTYPES = (
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float8_e4m3fn"),
    *("float8_e5m2", "float16", "bfloat16", "float32", "float64", "complex64"),
)

PLAIN = {
    "plain dict": {"a": WEIGHT, "b": torch.ones(3)},
    "state dict": torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)).state_dict(),
    "parameters": {"p": torch.nn.Parameter(WEIGHT), "q": torch.nn.Parameter(WEIGHT, requires_grad=False)},
    "views": {
        "whole": WEIGHT,
        "rows": WEIGHT[1:3],
        "turned": WEIGHT.t(),
        "flat": WEIGHT.view(-1),
        "one": WEIGHT[:1].t(),
    },
    "shapes": {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "deep": torch.ones(2, 1, 3, 1),
        "ü": WEIGHT + 1,
    },
    "many": {f"h.{n}.weight": torch.full((n + 1,), float(n)) for n in range(400)},
    "large": {"w": torch.zeros(70_000), "v": torch.zeros(300, 300).t()},
    **{name: {"w": torch.arange(7).to(getattr(torch, name))} for name in DTYPES},
    "nothing": {},
}


def saved(obj: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def pickle_of(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def read(content: bytes) -> ShardContents:
    return read_pickled(io.BytesIO(content), "pytorch_model.bin", len(content))


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reading as torch reads, without the form that is known here."""

    def read_by_torch(content: bytes) -> ShardContents:
        with monkeypatch.context() as patch:
            patch.setattr(pickled, "_plain_tensors", lambda *_: None)
            return read(content)

    return read_by_torch


@pytest.mark.parametrize("name", PLAIN)
def test_the_tensors_are_those_that_torch_finds(name: str, by_torch: Any) -> None:
    content = saved(PLAIN[name])
    found = read_state_dict(pickle_of(content))
    assert {key: tensor.shape for key, tensor in found.items()} == {k: tuple(v.shape) for k, v in PLAIN[name].items()}
    assert read(content) == by_torch(content)


@pytest.mark.parametrize(
    "obj",
    [
        torch.nn.Linear(2, 2),
        {"w": WEIGHT, "epoch": 3},
        {"state_dict": {"w": WEIGHT}},
        [WEIGHT],
        {1: WEIGHT},
        {"sparse": WEIGHT.to_sparse()},
        {"conjugate": torch.zeros(2, dtype=torch.complex64).conj()},
        {"meta": torch.empty(2, device="meta")},
        {"w": WEIGHT, "line\nbreak": WEIGHT},
    ],
    ids=str,
)
def test_everything_else_is_left_to_torch(obj: Any) -> None:
    with pytest.raises(NotAStateDictError):
        read_state_dict(pickle_of(saved(obj)))


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_called_or_imported(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "pwned"
    for hostile in ({"w": Exploit(mark)}, Exploit(mark), {"x": {"y": [Exploit(mark)]}}):
        with pytest.raises(NotAStateDictError):
            read_state_dict(pickle.dumps(hostile, protocol))
    assert not mark.exists()


@pytest.mark.parametrize(
    "made",
    [
        b"",
        b".",
        b"\x80\x02}.garbage",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
        b"\x80\x02}q\x00h\x07.",
        b"\x80\x02(K\x01K\x02u.",
        b"\x80\x02\x85\x85\x85.",
        b"\x80\x02}}K\x01s.",
    ],
)
def test_a_senseless_pickle_is_not_a_state_dict(made: bytes) -> None:
    try:
        assert read_state_dict(made) == {}
    except NotAStateDictError:
        return


def test_damage_never_leads_outside_the_file() -> None:
    whole = saved({"a": WEIGHT, "t": WEIGHT.t(), "b": torch.ones(3)})
    begin = whole.index(pickle_of(whole))
    dice = random.Random(4)
    readable = 0
    for _ in range(1500):
        content = bytearray(whole)
        content[begin + dice.randrange(len(pickle_of(whole)))] = dice.randrange(256)
        try:
            ours = read(bytes(content))
        except CheckpointError:
            continue
        assert all(0 <= stored.offset_bytes <= stored.end_bytes <= len(content) for stored in ours.tensors)
        readable += 1
    assert readable


def test_strides_show_the_orientation_of_a_tensor() -> None:
    assert PickledTensor("float32", "0", 96, 0, (4, 6), (6, 1)).is_row_major
    assert PickledTensor("float32", "0", 96, 0, (4, 6), (1, 4)).is_column_major
    assert not PickledTensor("float32", "0", 96, 0, (4, 6), (1, 4)).is_row_major
    assert PickledTensor("float32", "0", 96, 0, (4, 1), (1, 99)).is_row_major
    skipping = PickledTensor("float32", "0", 96, 0, (4, 3), (6, 1))
    assert not skipping.is_row_major
    assert not skipping.is_column_major


def test_a_bin_is_described_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(PLAIN["state dict"], path)
    code = (
        "import sys\nfrom int8cli.checkpoint.pickled import read_pickled\n"
        f"layout = read_pickled(open({str(path)!r}, 'rb'), 'x.bin', {path.stat().st_size})\n"
        "print(len(layout.tensors), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert result.stdout.split() == [str(len(PLAIN["state dict"])), "False"]
