"""A pickle that would crash, hang or exhaust the memory of its reader is refused before it is unpickled."""

import io
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.program import environment

from int8cli.checkpoint import pickle_bounds
from int8cli.checkpoint.pickle_bounds import MOST_NESTED, BoundedReader, PickleBoundsError, check_pickle
from int8cli.checkpoint.pickled import load_legacy, read_pickled
from int8cli.checkpoint.state_dict_pickle import NotAStateDictError, read_state_dict
from int8cli.errors import CheckpointError, UnsafePickleError

PROTO, STOP = b"\x80\x02", b"."


def nested(depth: int) -> bytes:
    """A tuple in a tuple in a tuple …"""
    return b")" + b"\x85" * depth


def doubled(depth: int) -> bytes:
    """A tuple of twice the tuple before: 2^depth parts."""
    return b"K\x01\x85q\x00" + b"h\x00\x86q\x00" * depth


def doubled_lists(depth: int) -> bytes:
    return b"]q\x00" + b"](h\x00h\x00eq\x00" * depth


def doubled_dicts(depth: int) -> bytes:
    return b"}q\x00" + b"}(K\x01h\x00K\x02h\x00uq\x00" * depth


def doubled_ordered_dicts(depth: int) -> bytes:
    made = b"ccollections\nOrderedDict\n)R"
    return made + b"q\x00" + (made + b"(K\x01h\x00K\x02h\x00uq\x00") * depth


def doubled_by_rebuilding(depth: int) -> bytes:
    """Through the one function of torch that calls another."""
    made = b"ctorch._tensor\n_rebuild_from_type_v2\n(ccollections\nOrderedDict\nccollections\nOrderedDict\n"
    return b"K\x01q\x00" + (made + b"](K\x01h\x00\x86K\x02h\x00\x86e\x85)tRq\x00") * depth


HOSTILE = {
    "deep": nested(300_000),
    "just too deep": nested(MOST_NESTED + 1),
    "doubled": doubled(40),
    "doubled lists": doubled_lists(40),
    "doubled dicts": doubled_dicts(40),
    "doubled ordered dicts": doubled_ordered_dicts(40),
    "doubled by rebuilding": doubled_by_rebuilding(40),
    "duplicated": b")2" + b"\x86" * 3,
    "text over and over": b"X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"q\x00(" + b"h\x00" * 2000 + b"t",
}
PLACES = {
    "a key": lambda thing: b"}" + thing + b"K\x01s",
    "a value": lambda thing: b"}X\x01\x00\x00\x00a" + thing + b"s",
    "a storage": lambda thing: b"(" + thing + b"K\x01K\x01K\x01K\x01tQ",
    "a storage's name": lambda thing: b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + thing + b"K\x01K\x01tQ",
    "a function": lambda thing: thing + b")R",
    "arguments": lambda thing: b"ctorch._utils\n_rebuild_tensor_v2\n" + thing + b"R",
    "a class": lambda thing: thing + b")\x81",
    "state": lambda thing: b"ccollections\nOrderedDict\n)R" + thing + b"b",
}


def archive(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("archive/data.pkl", data)
        packed.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def legacy(data: bytes) -> bytes:
    state: dict[str, torch.Tensor] = {}
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    written = buffer.getvalue()
    buffer.seek(0)
    for _ in range(3):
        pickle.load(buffer)
    begin = buffer.tell()
    pickle.load(buffer)
    return written[:begin] + data + written[buffer.tell() :]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("form", [archive, legacy])
def test_unbounded_growth_and_nesting_are_refused_everywhere(form: Any, what: str, place: str) -> None:
    content = form(PROTO + PLACES[place](HOSTILE[what]) + STOP)
    with pytest.raises(UnsafePickleError, match="not unpickled") as raised:
        read_pickled(io.BytesIO(content), "x.bin", len(content))
    assert "x.bin" in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("what", HOSTILE)
def test_the_reader_without_torch_refuses_all_of_it(what: str) -> None:
    for place in PLACES.values():
        with pytest.raises(NotAStateDictError) as raised:
            read_state_dict(PROTO + place(HOSTILE[what]) + STOP)
        assert len(str(raised.value)) < 500


def test_a_hostile_legacy_file_is_not_loaded_either(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(legacy(PROTO + PLACES["a key"](HOSTILE["deep"]) + STOP))
    with pytest.raises(UnsafePickleError):
        load_legacy(path)


def test_hostile_files_do_not_end_the_process(tmp_path: Path) -> None:
    """Runs in a separate process, which would die of a signal without the limits."""
    (tmp_path / "x.bin").write_bytes(archive(PROTO + PLACES["a key"](HOSTILE["deep"]) + STOP))
    code = (
        "import sys, int8cli.checkpoint.pickled as p; from int8cli.errors import UnsafePickleError\n"
        "try: p.read_pickled(open(sys.argv[1], 'rb'), 'x.bin', int(sys.argv[2]))\n"
        "except UnsafePickleError: print('refused')"
    )
    path = tmp_path / "x.bin"
    command = [sys.executable, "-c", code, str(path), str(path.stat().st_size)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (0, "refused\n")


def test_more_steps_than_any_checkpoint_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_bounds, "MOST_OPCODES", 1000)
    with pytest.raises(PickleBoundsError, match="more than 1,000 steps"):
        check_pickle(io.BytesIO(PROTO + b"N0" * 600 + b"N" + STOP))


@pytest.mark.parametrize("opcode", [b"X\x00\x00\x00\x7f", b"\x8d" + b"\xff" * 7 + b"\x7f", b"S'" + b"a" * 2000])
def test_no_more_is_read_than_is_allowed(opcode: bytes) -> None:
    class Counting(io.BytesIO):
        asked = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.asked = max(self.asked, size or 0)
            return super().read(size)

    file = Counting(PROTO + opcode)
    with pytest.raises(PickleBoundsError, match="longer"):
        check_pickle(BoundedReader(file, 1000))
    assert file.asked <= 1000


@pytest.mark.parametrize("made", [b"", b".", b"\x85.", b"h\x07.", b"}K\x01s.", b"(K\x01", b"(0.", b"u.", b"\xff."])
def test_a_senseless_pickle_is_damaged(made: bytes) -> None:
    try:
        check_pickle(io.BytesIO(PROTO + made))
    except ValueError:
        return
    assert made == b"."  # nothing is left to return, which its reader will notice


TIED = torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    "usual",
    [
        {"a": TIED, "b": TIED, "c": TIED},
        torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)).state_dict(),
        OrderedDict(model={"w": torch.ones(2)}, optimizer={"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]}),
        {f"h.{n}.weight": torch.ones(1) for n in range(3000)},
        [[[[(1, 2), (3, (4,))]]]],
        {"sparse": torch.eye(3).to_sparse()},
    ],
    ids=range(6),
)
@pytest.mark.parametrize("form", [True, False], ids=["zip", "legacy"])
def test_what_torch_saves_is_within_the_bounds(usual: Any, form: bool) -> None:
    buffer = io.BytesIO()
    torch.save(usual, buffer, _use_new_zipfile_serialization=form)
    if form:
        with zipfile.ZipFile(buffer) as packed:
            check_pickle(io.BytesIO(packed.read(next(n for n in packed.namelist() if n.endswith("data.pkl")))))
        return
    buffer.seek(0)
    for _ in range(5):
        check_pickle(buffer)


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.just(()),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(trees, st.integers(0, 5))
def test_random_trees_stay_within_the_limits(tree: Any, protocol: int) -> None:
    """It is written and read again, so that no two places share an object."""
    made = pickletools.optimize(pickle.dumps(pickle.loads(pickle.dumps(tree)), protocol))
    try:
        check_pickle(io.BytesIO(made))
    except PickleBoundsError as error:
        assert "two places" in str(error)  # noqa: PT017  an empty dict or list that Python shares


def test_a_storage_with_two_types_is_left_to_torch() -> None:
    content = bytearray(saved := _saved({"a": torch.ones(4), "b": torch.arange(4)}))
    with zipfile.ZipFile(io.BytesIO(saved)) as packed:
        data = packed.read("archive/data.pkl")
    first, second = data.index(b"X\x01\x00\x00\x000"), data.index(b"X\x01\x00\x00\x001")
    assert second > first
    changed = data[: second + 5] + b"0" + data[second + 6 :]
    with pytest.raises(NotAStateDictError, match="two storages"):
        read_state_dict(changed)
    content = bytearray(_repacked(saved, changed))
    with pytest.raises(CheckpointError):
        read_pickled(io.BytesIO(content), "x.bin", len(content))


def _saved(obj: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def _repacked(content: bytes, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            target.writestr(name, data if name.endswith("data.pkl") else source.read(name))
    return buffer.getvalue()


def text(of: str) -> bytes:
    return b"X" + len(of).to_bytes(4, "little") + of.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def called(function: bytes, arguments: bytes) -> bytes:
    return function + arguments + b"R"


HUGE = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
ENCODE = named("_codecs", "encode")
FROM_TYPE = named("torch._tensor", "_rebuild_from_type_v2")
CALLS = {
    "memory": called(named("__builtin__", "bytearray"), HUGE + b"\x85"),
    "memory through a call of a call": called(
        FROM_TYPE, b"(" + named("__builtin__", "bytearray") + named("torch", "Tensor") + HUGE + b"\x85}t"
    ),
    "a codec that doubles": called(ENCODE, called(ENCODE, text("a") + text("hex") + b"\x86") + text("hex") + b"\x86"),
    "a codec that takes quadratic time": called(ENCODE, text("é" * 100) + text("punycode") + b"\x86"),
    "a tensor": called(named("torch", "Tensor"), HUGE + b"\x85"),
    "a storage": called(named("torch.storage", "UntypedStorage"), HUGE + b"\x85"),
    "a new storage": named("torch.storage", "UntypedStorage") + HUGE + b"\x85\x81",
    "a sparse tensor's class": called(named("torch.sparse", "FloatTensor"), b")"),
    "a set": called(named("__builtin__", "set"), b"]\x85"),
    "what is no function": b"K\x01)R",
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("form", [archive, legacy])
def test_only_functions_that_make_tensors_are_called(form: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch unpickled it"))
    content = form(PROTO + b"}" + text("a") + CALLS[what] + b"s" + STOP)
    with pytest.raises(UnsafePickleError, match=r"it (names|calls) .*not unpickled"):
        read_pickled(io.BytesIO(content), "x.bin", len(content))


@pytest.mark.parametrize("form", [archive, legacy])
def test_no_more_is_piled_up_than_a_list_of_tensors_needs(form: Any) -> None:
    made = b")" * (pickle_bounds.MOST_STACKED + 1)
    content = form(PROTO + made + STOP)
    with pytest.raises(UnsafePickleError, match="piles up"):
        read_pickled(io.BytesIO(content), "x.bin", len(content))
    with pytest.raises(NotAStateDictError):
        read_state_dict(PROTO + made + STOP)


def test_attributes_of_a_tensor_replace_none_of_its_methods() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    for name in ("is_contiguous", "dim", "detach", "t"):
        setattr(tensor, name, "not a method")
    buffer = io.BytesIO()
    torch.save({"a": tensor}, buffer)
    found = read_pickled(buffer, "x.bin", buffer.tell())
    assert [(stored.spec.name, stored.spec.shape) for stored in found.tensors] == [("a", (2, 3))]


def test_a_sparse_tensor_in_an_old_file_is_named() -> None:
    buffer = io.BytesIO()
    torch.save({"odd": torch.eye(3).to_sparse()}, buffer, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"'odd'.*sparse"):
        read_pickled(buffer, "x.bin", buffer.tell())
