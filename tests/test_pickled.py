"""PyTorch files: tensors are found at the right offsets, and only tensors are unpickled."""

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from int8cli.checkpoint import zip_records
from int8cli.checkpoint.pickled import load_legacy, read_pickled
from int8cli.checkpoint.tensor import ShardContents
from int8cli.errors import CheckpointError, CorruptShardError, UnsafePickleError, UnsupportedModelError


def saved(obj: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def read(content: bytes) -> ShardContents:
    return read_pickled(io.BytesIO(content), "pytorch_model.bin", len(content))


def raw(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().contiguous()
    return b"" if tensor.numel() == 0 else tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_found(content: bytes, tensors: dict[str, torch.Tensor]) -> None:
    layout = read(content)
    assert {stored.spec.name for stored in layout.tensors} == set(tensors)
    for stored in layout.tensors:
        tensor = tensors[stored.spec.name]
        assert stored.spec.shape == tuple(tensor.shape)
        found = content[stored.offset_bytes : stored.end_bytes]
        assert found == raw(tensor.t() if stored.column_major else tensor)


def repacked(
    content: bytes, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED
) -> bytes:
    """The same archive, written by another tool, each record passed through `change`; None drops it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w", compression) as target:
        for name in source.namelist():
            record = change(name, source.read(name))
            if record is not None:
                target.writestr(name, record)
    return buffer.getvalue()


WEIGHT = torch.arange(24, dtype=torch.float32).reshape(4, 6)


INTEGERS = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64"
FLOATS = "float8_e4m3fn float8_e5m2 float16 bfloat16 float32 float64 complex64"


def test_every_dtype_is_found_where_it_lies() -> None:
    tensors = {name: torch.arange(7).to(getattr(torch, name)) for name in f"{INTEGERS} {FLOATS}".split()}
    content = saved(tensors)
    assert_found(content, tensors)
    dtypes = {stored.spec.name: stored.spec.dtype for stored in read(content).tensors}
    assert dtypes["bfloat16"] == "BF16"
    assert dtypes["float8_e4m3fn"] == "F8_E4M3"
    assert dtypes["bool"] == "BOOL"


def test_scalars_empty_tensors_parameters_and_odd_names_are_found() -> None:
    tensors = {"s": torch.tensor(3.0), "e": torch.empty(0, 4), "p": torch.nn.Parameter(WEIGHT), "ü.weight": WEIGHT + 1}
    assert_found(saved(tensors), tensors)


def test_a_state_dict_with_its_version_metadata_is_a_plain_dict() -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)).state_dict()
    assert hasattr(state, "_metadata")
    assert isinstance(state, OrderedDict)
    assert_found(saved(state), state)


def test_views_and_tied_weights_are_found_inside_their_storage() -> None:
    tensors = {
        "whole": WEIGHT,
        "rows": WEIGHT[1:3],
        "tied": WEIGHT,
        "transposed": WEIGHT.t(),
        "reshaped": WEIGHT.view(-1),
    }
    content = saved(tensors)
    assert_found(content, tensors)
    stored = {tensor.spec.name: tensor for tensor in read(content).tensors}
    assert stored["whole"].offset_bytes == stored["tied"].offset_bytes == stored["transposed"].offset_bytes
    assert stored["rows"].offset_bytes == stored["whole"].offset_bytes + 24
    assert [name for name, tensor in stored.items() if tensor.column_major] == ["transposed"]


def test_tensors_come_in_file_order() -> None:
    offsets = [stored.offset_bytes for stored in read(saved({f"t{i}": torch.ones(i) for i in range(12)})).tensors]
    assert offsets == sorted(offsets)


def test_an_archive_that_another_tool_packed_is_read_at_its_own_offsets() -> None:
    tensors = {"a": WEIGHT, "b": WEIGHT.t(), "c": torch.ones(5)}
    content = repacked(saved(tensors), lambda name, record: record)
    assert_found(content, tensors)


def test_only_the_directory_and_the_pickle_are_read() -> None:
    class Counting(io.BytesIO):
        count = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.count += len(data)
            return data

    file = Counting(saved({"a": torch.zeros(1_000_000), "b": torch.zeros(1_000_000)}))
    read_pickled(file, "pytorch_model.bin", len(file.getvalue()))
    assert file.count < 100_000


def test_an_older_torch_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved({"a": WEIGHT, "t": WEIGHT.t(), "rows": WEIGHT[1:], "p": torch.nn.Parameter(torch.ones(3))})
    layout = read(content)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.1"))
    assert read(content) == layout


def test_files_are_read_in_threads() -> None:
    contents = [saved({f"t{i}": torch.ones(i + 1), "u": WEIGHT}) for i in range(32)]
    with ThreadPoolExecutor(8) as pool:
        layouts = list(pool.map(read, contents))
    assert [layout.tensors for layout in layouts] == [read(content).tensors for content in contents]


def test_importing_the_module_does_not_change_torch() -> None:
    code = "import sys, int8cli.checkpoint.pickled; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("view", [WEIGHT[:, ::2], WEIGHT[:, :3], torch.ones(1).expand(5), WEIGHT[None].transpose(1, 2)])
def test_a_view_that_skips_or_repeats_is_named(view: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'odd'.*strides") as caught:
        read(saved({"odd": view}))
    assert "contiguous" in caught.value.hint


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (WEIGHT.to_sparse(), "sparse"),
        (torch.tensor([1j]).to(torch.complex128), "complex128"),
        (torch.zeros(2, dtype=torch.complex64).conj(), "conjugate"),
        (torch.empty(2, device="meta"), "without its data"),
    ],
)
def test_a_tensor_that_safetensors_cannot_express_is_named(tensor: torch.Tensor, word: str) -> None:
    with pytest.raises(CheckpointError, match=f"'odd'.*{word}"):
        read(saved({"odd": tensor}))


@pytest.mark.filterwarnings("ignore:(torch.quantize_per_tensor|TypedStorage).* deprecated:UserWarning")
def test_quantized_tensors_are_refused() -> None:
    with pytest.raises(CheckpointError, match="quantized"):
        read(saved({"q": torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)}))


class Exploit:
    """What a hostile pickle would do: run a command when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_is_refused_and_runs_nothing(legacy: bool, tmp_path: Path) -> None:
    mark = tmp_path / "pwned"
    with pytest.raises(UnsafePickleError) as caught:
        read(saved({"w": WEIGHT, "x": Exploit(mark)}, legacy=legacy))
    assert not mark.exists()
    assert legacy or "posix.system" in str(caught.value)


def test_a_bare_pickle_is_not_unpickled(tmp_path: Path) -> None:
    with pytest.raises(UnsafePickleError, match="bare Python pickle"):
        read(pickle.dumps(Exploit(tmp_path / "pwned")))
    assert not (tmp_path / "pwned").exists()


def test_a_pickled_module_is_refused_with_its_class_name() -> None:
    with pytest.raises(UnsafePickleError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read(saved(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        ({"state_dict": {"w": WEIGHT}, "epoch": 3}, "'state_dict' is of type dict"),
        ({"w": WEIGHT, "epoch": 3}, "'epoch' is of type int"),
        ({"state": {0: {"exp_avg": WEIGHT}}, "param_groups": [{"lr": 0.1}]}, "'state' is of type dict"),
        ([WEIGHT], "one object of type list"),
        (WEIGHT, "one object of type Tensor"),
        ({1: WEIGHT}, "an entry 1, of type int"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_anything_but_named_tensors_is_refused_by_key_and_type(obj: Any, words: str, legacy: bool) -> None:
    with pytest.raises(UnsafePickleError, match=words):
        read(saved(obj, legacy=legacy))


def test_a_compressed_record_is_refused() -> None:
    content = repacked(saved({"w": torch.zeros(1000)}), lambda _, record: record, zipfile.ZIP_DEFLATED)
    with pytest.raises(CorruptShardError, match="compressed"):
        read(content)


def test_a_missing_record_is_refused() -> None:
    with pytest.raises(CorruptShardError):
        read(repacked(saved({"w": WEIGHT}), lambda name, record: None if name.endswith("data/0") else record))


def test_a_zip_of_something_else_is_refused() -> None:
    with pytest.raises(CorruptShardError, match=r"no data\.pkl"):
        read(repacked(saved({"w": WEIGHT}), lambda name, record: None if name.endswith("data.pkl") else record))


def test_a_big_endian_file_is_refused() -> None:
    with pytest.raises(CheckpointError, match="b'big'"):
        read(repacked(saved({"w": WEIGHT}), lambda name, record: b"big" if name.endswith("byteorder") else record))


@pytest.mark.filterwarnings("ignore:`torch.jit.* deprecated:DeprecationWarning")
def test_a_torchscript_program_is_recognised() -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    with pytest.raises(UnsupportedModelError, match="TorchScript"):
        read(buffer.getvalue())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"", "0 bytes"),
        (bytes(range(200)), "do not begin"),
        (b"PK\x03\x04 and no archive", "damaged zip archive"),
    ],
)
def test_other_files_are_recognised_by_their_content(content: bytes, words: str) -> None:
    with pytest.raises(CorruptShardError, match=words):
        read(content)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_never_read(legacy: bool) -> None:
    content = saved({"a": WEIGHT, "b": torch.ones(300)}, legacy=legacy)
    for length in (*range(0, len(content), 37), len(content) - 1):
        with pytest.raises((CorruptShardError, UnsafePickleError)):
            read(content[:length])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # from pickletools, on damaged text
def test_damage_raises_only_checkpoint_errors(legacy: bool) -> None:
    whole = saved({"a": WEIGHT, "t": WEIGHT.t(), "b": torch.ones(3)}, legacy=legacy)
    dice = random.Random(20220815)
    for _ in range(2000):
        content = bytearray(whole)
        content[dice.randrange(len(content))] = dice.randrange(256)
        try:
            layout = read(bytes(content))
        except CheckpointError:
            continue
        assert all(0 <= stored.offset_bytes <= stored.end_bytes <= len(content) for stored in layout.tensors)


def test_a_legacy_file_is_planned_from_its_pickles_and_loaded_at_once(tmp_path: Path) -> None:
    tensors = {"a": WEIGHT, "tied": WEIGHT, "t": WEIGHT.t(), "rows": WEIGHT[2:], "h": torch.ones(3).half()}
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(saved(tensors, legacy=True))
    layout = read(path.read_bytes())
    assert not layout.mappable
    assert [(t.spec.name, t.spec.shape) for t in layout.tensors] == [(n, tuple(t.shape)) for n, t in tensors.items()]
    assert [t.offset_bytes for t in layout.tensors] == [0, 96, 192, 288, 336]
    loaded = load_legacy(path)
    assert list(loaded) == list(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_planning_a_legacy_file_does_not_allocate_it() -> None:
    head, device, tail = saved({"w": torch.zeros(4)}, legacy=True).partition(b"cpu")
    claims = head + device + tail.replace(b"K\x04", b"J\x00\x00\x00\x40", 1)  # a storage of 2**30 floats, not of 4
    with pytest.raises(CorruptShardError, match="its tensors end at byte 4,294,"):
        read(claims)


def damaged(content: bytes, places: list[int], dice: random.Random) -> bytes:
    """The archive with one to three bytes changed, lost or added near these places."""
    changed = bytearray(content)
    for _ in range(dice.randint(1, 3)):
        place = min(dice.choice(places) + dice.randrange(60), len(changed) - 1)
        match dice.randrange(4):
            case 0:
                changed[place] ^= 1 << dice.randrange(8)
            case 1:
                changed[place] = dice.choice([0, 1, 255, dice.randrange(256)])
            case 2:
                del changed[place]
            case _:
                changed.insert(place, dice.randrange(256))
    return bytes(changed)


def test_a_damaged_archive_is_read_like_torch_or_refused() -> None:
    tensors = {"a": WEIGHT, "b": torch.arange(4).half(), "c": torch.ones(3, dtype=torch.bfloat16)}
    content = saved(tensors)
    marks = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07")
    places = [place for place in range(len(content)) if content[place : place + 4] in marks]
    dice, readable = random.Random(8), 0
    for _ in range(1500):
        changed = damaged(content, places, dice)
        try:
            read(changed)
        except CheckpointError:
            continue
        loaded = torch.load(io.BytesIO(changed), weights_only=True, mmap=False)
        assert_found(changed, loaded)
        readable += 1
    assert readable > 100


def test_records_below_two_directories_are_refused() -> None:
    content = saved({"w": WEIGHT}).replace(b"archive/data/0", b"another/data/0")
    with pytest.raises(CorruptShardError, match="not in the directory of the others"):
        read(content)


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("version", None, "'version' holds b'', not a number"),
        ("version", b"x", "'version' holds b'x', not a number"),
        ("version", b"11", "version 11 of its format"),
        ("version", b"3" * 1000, "has 1,000 bytes, more than it can need"),
        ("byteorder", b"little" * 1000, "has 6,000 bytes, more than it can need"),
        (".format_version", b"one", "not a number"),
        (".data/serialization_id", b"\xff", "not text"),
    ],
)
def test_bad_small_records_are_refused(name: str, record: bytes | None, words: str) -> None:
    content = repacked(saved({"w": WEIGHT}), lambda path, data: record if path == f"archive/{name}" else data)
    with pytest.raises(CheckpointError, match=words):
        read(content)


def test_a_changed_pickle_is_detected() -> None:
    with pytest.raises(CorruptShardError, match=r"the record 'data\.pkl' is wrong"):
        read(saved({"weight": WEIGHT}).replace(b"weight", b"weighs"))


def test_a_directory_larger_than_any_checkpoint_needs_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_records, "_DIRECTORY_LIMIT_BYTES", 100)
    with pytest.raises(CorruptShardError, match="more than any checkpoint needs"):
        read(saved({"w": WEIGHT}))


def test_an_archive_over_4_gib_is_read_at_the_right_offsets(tmp_path: Path) -> None:
    """The file is sparse and uses no disk space. Its offsets need 64 bits."""
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(1), "b": WEIGHT}, path)
    content = path.read_bytes()
    hole = 5 << 30
    with zipfile.ZipFile(path) as archive:
        begin = archive.getinfo("x/data/1").header_offset
        directory = archive.start_dir
    moved = bytearray(content[directory:])
    entry = moved.index(b"x/data/1") - 46
    # The last record's header moves behind the hole, and its offset into a 64-bit field.
    name_bytes, extra_bytes = struct.unpack_from("<2H", moved, entry + 28)
    struct.pack_into("<I", moved, entry + 42, 0xFFFFFFFF)
    struct.pack_into("<H", moved, entry + 30, extra_bytes + 12)
    moved[entry + 46 + name_bytes : entry + 46 + name_bytes] = struct.pack("<2HQ", 1, 8, begin + hole)
    for later in ("x/version", "x/.data/serialization_id"):
        at = moved.index(later.encode()) - 46
        lengths = struct.unpack_from("<2H", moved, at + 28)
        offset = struct.unpack_from("<I", moved, at + 42)[0]
        struct.pack_into("<I", moved, at + 42, 0xFFFFFFFF)
        struct.pack_into("<H", moved, at + 30, lengths[1] + 12)
        moved[at + 46 + lengths[0] : at + 46 + lengths[0]] = struct.pack("<2HQ", 1, 8, offset + hole)
    end64, end = moved.index(b"PK\x06\x06"), moved.index(b"PK\x05\x06")
    struct.pack_into("<2Q", moved, end64 + 40, end64, directory + hole)
    struct.pack_into("<Q", moved, moved.index(b"PK\x06\x07") + 8, directory + hole + end64)
    struct.pack_into("<2I", moved, end + 12, end64, 0xFFFFFFFF)
    with path.open("r+b") as file:
        file.seek(begin + hole)
        file.write(content[begin:directory])
        file.write(moved)
    size = path.stat().st_size
    with path.open("rb") as file:
        found = {stored.spec.name: stored for stored in read_pickled(file, "x.bin", size).tensors}
        file.seek(found["b"].offset_bytes)
        assert file.read(96) == raw(WEIGHT)
    assert found["b"].offset_bytes > hole
    assert torch.equal(torch.load(path, weights_only=True, mmap=True)["b"], WEIGHT)


def test_an_archive_without_checksums_is_read() -> None:
    """As torch.save writes it where it is told not to compute them."""
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        content = saved({"w": WEIGHT})
    finally:
        torch.serialization.set_crc32_options(computed)
    assert_found(content, {"w": WEIGHT})


@pytest.mark.parametrize("change", [lambda data: data + b"more", lambda data: data[:-4]], ids=["longer", "shorter"])
@pytest.mark.parametrize("reader", ["ours", "torch's"])
def test_a_storage_of_another_size_than_its_pickle_has_is_refused(
    change: Callable[[bytes], bytes], reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reader == "torch's":
        monkeypatch.setattr("int8cli.checkpoint.pickled._plain_tensors", lambda records, pickle, file_name: None)
    content = repacked(saved({"w": WEIGHT}), lambda path, data: change(data) if path.endswith("data/0") else data)
    with pytest.raises(CorruptShardError, match="the storage of tensor 'w' has"):
        read(content)
