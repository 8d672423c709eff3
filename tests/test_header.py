"""The safetensors header, with the format's own reader and writer as judges."""

import io
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from packaging.version import Version
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load_file, save, save_file

from int8cli.checkpoint import header, header_json
from int8cli.checkpoint.header import encode_header, read_header
from int8cli.checkpoint.serialize import serialize
from int8cli.checkpoint.tensor import DTYPE_BITS, ShardContents, TensorSpec
from int8cli.errors import CheckpointError, CorruptShardError


def packed(header: Mapping[str, Any] | str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with exactly this header, valid or not."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int = 0, end: int = 16, shape: Any = (2, 2), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read(content: bytes) -> ShardContents:
    return read_header(io.BytesIO(content), "model.safetensors", len(content))


def accepted_by_safetensors(content: bytes, path: Path) -> bool:
    path.write_bytes(content)
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError, ValueError):
        return False
    return True


# From this release on, the reference supports every dtype of the format. Older ones are tested with what they support.
KNOWS_EVERY_DTYPE = Version(safetensors.__version__) >= Version("0.8")

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.weight": torch.arange(6).to(torch.bfloat16).reshape(2, 3),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 4, dtype=torch.float16),
    "mask": torch.tensor([True, False, True]),
    'größe\n"quoted" \x7f\x01': torch.arange(5, dtype=torch.uint8),
    "float8": torch.zeros(3, dtype=torch.float8_e4m3fn),
    "half": torch.ones(3, dtype=torch.float16),
    "double": torch.ones(1, dtype=torch.float64),
    "short": torch.ones(2, dtype=torch.int16),
}
if KNOWS_EVERY_DTYPE:
    TENSORS |= {"complex": torch.ones(2, dtype=torch.complex64), "wide": torch.ones(2, dtype=torch.uint64)}


def test_what_safetensors_writes_is_read_with_the_same_names_shapes_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", "note": "ü"})
    content = path.read_bytes()
    layout = read(content)
    assert layout.metadata == {"format": "pt", "note": "ü"}
    assert layout.file_bytes == len(content)
    assert layout.mappable
    assert {tensor.spec.name for tensor in layout.tensors} == set(TENSORS)
    assert [tensor.offset_bytes for tensor in layout.tensors] == sorted(t.offset_bytes for t in layout.tensors)
    for stored in layout.tensors:
        tensor = TENSORS[stored.spec.name]
        assert stored.spec.shape == tuple(tensor.shape)
        raw = b"" if tensor.numel() == 0 else tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[stored.offset_bytes : stored.end_bytes] == raw


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_an_encoded_header_is_byte_for_byte_that_of_safetensors(metadata: dict[str, str] | None) -> None:
    theirs = save(TENSORS, metadata)
    specs = [stored.spec for stored in read(theirs).tensors]
    random.Random(0).shuffle(specs)
    ours, stored = encode_header(specs, metadata or {})
    assert ours == theirs[: len(ours)]
    assert stored == read(theirs).tensors
    assert all(tensor.offset_bytes * 8 % DTYPE_BITS[tensor.spec.dtype] == 0 for tensor in stored)


@pytest.mark.parametrize("metadata", [None, {"é": "“quoted”"}])
def test_serialized_tensors_are_byte_for_byte_those_of_safetensors(metadata: dict[str, str] | None) -> None:
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    whole = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    tensors = {f"{dtype}": torch.arange(6).reshape(2, 3).to(dtype) for dtype in (*floats, *whole)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "odd": torch.ones(3, dtype=torch.int8)}
    assert serialize(tensors, metadata) == save(tensors, metadata)


def test_a_transposed_tensor_is_serialized_by_its_values() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    assert serialize({"x": tensor}) == save({"x": tensor.contiguous()})


@pytest.mark.skipif(not KNOWS_EVERY_DTYPE, reason="this release of safetensors does not know every type")
def test_an_encoded_header_opens_in_safetensors_with_every_dtype(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{i}.{dtype}", dtype, (2, 4)) for i, dtype in enumerate(DTYPE_BITS)]
    head, stored = encode_header(specs, {"b": "2", "a": "1"})
    content = head + bytes(stored[-1].end_bytes - len(head))
    assert accepted_by_safetensors(content, tmp_path / "all.safetensors")
    assert read(content).tensors == stored
    assert read(content).metadata == {"a": "1", "b": "2"}


def test_a_header_without_tensors_is_a_complete_file(tmp_path: Path) -> None:
    head, stored = encode_header([], {})
    assert stored == ()
    (tmp_path / "none.safetensors").write_bytes(head)
    assert load_file(tmp_path / "none.safetensors") == {}
    assert read(head).tensors == ()


@pytest.mark.parametrize("names", [("a", "a"), ("__metadata__",), ("\ud800",)])
def test_names_that_a_header_cannot_hold_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError):
        encode_header([TensorSpec(name, "F32", (1,)) for name in names], {"format": "pt"})


VALID = {
    "one tensor": packed({"test": entry()}, bytes(16)),
    "no tensors": packed("{}"),
    "only metadata": packed({"__metadata__": {"format": "pt"}}),
    "padding after": packed("{}\r \t\n"),
    "padding before": packed("\t\n{}\r "),
    "a scalar": packed({"s": entry(0, 4, [])}, bytes(4)),
    "an empty tensor": packed({"test": entry(0, 0, [2, 0], "I32")}),
    "an empty tensor amid others": packed({"a": entry(), "e": entry(16, 16, [0]), "b": entry(16, 20, [1])}, bytes(20)),
    "entries out of order": packed({"b": entry(16, 20, [1]), "a": entry()}, bytes(20)),
}
if KNOWS_EVERY_DTYPE:
    VALID["packed 4-bit floats"] = packed({"f": entry(0, 2, [4], "F4")}, bytes(2))


@pytest.mark.parametrize("case", VALID)
def test_a_valid_file_is_read(case: str, tmp_path: Path) -> None:
    assert accepted_by_safetensors(VALID[case], tmp_path / "x.safetensors")
    layout = read(VALID[case])
    assert [tensor.offset_bytes for tensor in layout.tensors] == sorted(t.offset_bytes for t in layout.tensors)


def test_a_padded_header_is_read() -> None:
    plain, padded = packed({"t": entry()}, bytes(16)), packed(json.dumps({"t": entry()}) + " " * 40, bytes(16))
    assert read(padded).tensors[0].offset_bytes == read(plain).tensors[0].offset_bytes + 40


# Case: the file, and what the message must say. The first group is the safetensors project's own list: its attacks/ and
# the invalid files of its tests.
INVALID: dict[str, tuple[bytes, str]] = {
    "claims a longer header than the file": (packed({"w": entry()}, bytes(16), length=1000), "claims 1,000 bytes"),
    "ten tensors over the same bytes": (packed({f"w{i}": entry() for i in range(10)}, bytes(16)), "overlaps"),
    "a polyglot": (packed({"test": entry()}, bytes(16) + b"extra_bogus_data_for_polyglot_file"), "34 bytes follow"),
    "two bytes short": (packed({"test": entry()}, bytes(14)), "header claims"),
    "an immense header": (packed({"test": entry()}, bytes(16), length=0xFFFFFF000000003C), "the format allows"),
    "nothing at all": (b"", "0 bytes"),
    "a length and no header": (packed("", length=60), "claims 60 bytes"),
    "no UTF-8": (packed(b"\xff"), "JSON object"),
    "no JSON": (packed("{"), "not valid JSON"),
    "a size that is not the shape's": (packed({"test": entry(0, 4)}, bytes(4)), "16 bytes"),
    "a shape that overflows": (packed({"test": entry(shape=[2, 2**64 - 2])}, bytes(16)), "overflows"),
    "a size that overflows": (packed({"test": entry(shape=[2, 2**63 - 1])}, bytes(16)), "overflows"),
    "half a byte of 4-bit floats": (packed({"f": entry(0, 1, [1], "F4")}, bytes(1)), "not a whole number of bytes"),
    # And what else a header can get wrong.
    "seven bytes": (bytes(7), "7 bytes"),
    "a header just too long": (packed("{}", length=100_000_001), "the format allows 100,000,000"),
    "no UTF-8 inside": (packed(b'{"\xff":1}'), "not UTF-8 at byte 10"),
    "an array": (packed("[]"), "JSON object"),
    "null": (packed("null"), "JSON object"),
    "a byte order mark": (packed("\ufeff{}"), "JSON object"),
    "two objects": (packed("{}{}"), "not valid JSON"),
    "absurd nesting": (packed('{"a":' * 200_000), "nests too deeply"),
    "a tensor named twice": (packed('{"a":%s,"a":%s}' % ((json.dumps(entry()),) * 2), bytes(16)), "'a' twice"),
    "a field given twice": (packed('{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"0"), "twice"),
    "half a surrogate pair": (packed('{"\\ud800":' + json.dumps(entry()) + "}", bytes(16)), "surrogate"),
    "half a surrogate pair in a list": (
        packed('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":[1,[["\\uDC00"]]]}}'),
        "surrogate",
    ),
    "a control character": (packed('{"a\n":' + json.dumps(entry()) + "}", bytes(16)), "not valid JSON"),
    "an entry that is a list": (packed({"a": ["F32", [2, 2], [0, 16]]}, bytes(16)), "'a' must have"),
    "an entry that is empty": (packed({"a": {}}), "it has nothing"),
    "no dtype": (packed({"a": {"shape": [0], "data_offsets": [0, 0]}}), "it has 'shape', 'data_offsets'"),
    "an unknown dtype": (packed({"a": entry(dtype="F33")}, bytes(16)), "unknown dtype 'F33'"),
    "a dtype that is a list": (packed({"a": entry(dtype=["F32"])}, bytes(16)), "unknown dtype"),
    "a shape that is a number": (packed({"a": entry(shape=4)}, bytes(16)), "the shape 4"),
    "true in a shape": (packed({"a": entry(shape=[True, 4])}, bytes(16)), "the shape"),
    "a float in a shape": (packed({"a": entry(shape=[2.0, 2])}, bytes(16)), "the shape"),
    "a float in an offset": (packed('{"a":{"dtype":"U8","shape":[10],"data_offsets":[0,1e1]}}', bytes(10)), "data_off"),
    "a negative extent": (packed({"a": entry(shape=[-2, -2])}, bytes(16)), "negative number"),
    "minus zero": (packed('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "negative number"),
    "a number of 5,000 digits": (packed('{"a":{"shape":[%s]}}' % ("9" * 5000)), "beyond 64 bits"),
    "a number just beyond 64 bits": (packed({"a": entry(shape=[2**64, 0])}), "beyond 64 bits"),
    "an extent that no tensor has": (packed({"a": entry(0, 0, [0, 2**63])}), "beyond 63 bits"),
    "an overflow before a zero": (packed({"a": entry(0, 0, [2**63, 4, 0])}), "overflows"),
    "NaN": (packed('{"a":NaN}'), "NaN"),
    "three offsets": (packed({"a": {**entry(), "data_offsets": [0, 8, 16]}}, bytes(16)), "data_offsets"),
    "begin after end": (packed({"a": entry(16, 0)}, bytes(16)), "ends before that"),
    "a hole": (packed({"a": entry(), "b": entry(20, 24, [1])}, bytes(24)), "'b' begins at data offset 20 and leaves a"),
    "a hole in front": (packed({"a": entry(4, 20)}, bytes(20)), "leaves a gap after the header"),
    "an overlap": (packed({"a": entry(), "b": entry(12, 16, [1])}, bytes(16)), "'b' begins at data offset 12 and over"),
    "offsets far outside": (packed({"a": entry(0, 4096, [1024])}, bytes(16)), "'a' ends beyond"),
    "data without tensors": (packed("{}", b"abc"), "3 bytes follow"),
    "metadata that is a list": (packed({"__metadata__": []}), "not an object"),
    "metadata with a number": (packed({"__metadata__": {"format": 1}}), "not a string"),
    "metadata with an object": (packed({"__metadata__": {"a": {"b": "c"}}}), "not a string"),
}
# Departures from the format's letter that its reader lets pass, and we do not.
STRICTER = {"an entry that is a list", "a tensor named twice", "an extent that no tensor has"}


@pytest.mark.parametrize("case", INVALID)
def test_a_bad_header_is_refused_with_file_and_reason(case: str, tmp_path: Path) -> None:
    content, fault = INVALID[case]
    with pytest.raises(CorruptShardError, match=r"^model\.safetensors: ") as caught:
        read(content)
    assert fault in str(caught.value)
    assert len(str(caught.value)) < 500
    assert accepted_by_safetensors(content, tmp_path / "x.safetensors") == (case in STRICTER)


@pytest.mark.parametrize(
    "header",
    [{"a": {**entry(), "stride": 1}}, {"__metadata__": None, "a": entry()}],
    ids=["a field more", "no metadata"],
)
def test_tensors_that_the_reference_reader_ignores_are_ignored(header: dict[str, Any], tmp_path: Path) -> None:
    content = packed(header, bytes(16))
    assert accepted_by_safetensors(content, tmp_path / "x.safetensors")
    layout = read(content)
    assert [stored.spec.name for stored in layout.tensors] == ["a"]
    assert layout.metadata == {}


def test_a_truncated_file_is_an_error_with_its_size_and_a_hint(tmp_path: Path) -> None:
    whole = packed({"test": entry()}, bytes(16))
    with pytest.raises(CorruptShardError) as caught:
        read(whole[:-3])
    assert f"header claims {len(whole):,} bytes, the file has {len(whole) - 3:,}" in str(caught.value)
    assert "run the same command again" in caught.value.hint


def test_many_tensors_over_the_same_bytes_are_refused_quickly() -> None:
    content = packed({f"weight_{i}": entry() for i in range(20_000)}, bytes(16))
    with pytest.raises(CorruptShardError, match="overlaps"):
        read(content)


def test_a_git_lfs_pointer_is_recognised() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    with pytest.raises(CorruptShardError, match="git-lfs pointer") as caught:
        read(pointer)
    assert "git lfs pull" in caught.value.hint


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>", b"\n <html><body>404</body>", b"<?xml version='1.0'?>"])
def test_a_web_page_is_recognised(page: bytes) -> None:
    with pytest.raises(CorruptShardError, match="web page"):
        read(page)


def test_only_the_header_is_read() -> None:
    content = packed({"t": entry(0, 2**30, [2**28])})
    size = len(content) + 2**30  # the data is not there to be read
    layout = read_header(io.BytesIO(content), "big.safetensors", size)
    assert layout.tensors[0].end_bytes == layout.file_bytes == size


def test_whatever_a_damaged_byte_leaves_acceptable_safetensors_accepts_too(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "e": torch.zeros(0, 2)}
    whole = save(tensors, {"format": "pt"})
    dice = random.Random(20230711)
    outcomes = {True: 0, False: 0}
    for turn in range(4000):
        content = bytearray(whole)
        if turn % 5 == 0:
            content = content[: dice.randrange(len(content))]
        else:
            content[dice.randrange(len(content))] = dice.choice((dice.randrange(256), *b'0123456789"{}[],:- '))
        try:
            read(bytes(content))
        except CorruptShardError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        assert accepted_by_safetensors(bytes(content), tmp_path / "x.safetensors"), bytes(content)
    assert min(outcomes.values()) > 100


def described_by_safetensors(content: bytes, path: Path) -> dict[str, tuple[str, list[int], bytes]] | None:
    """The dtype, shape and bytes of each tensor by the format's own reader; None if it refuses the file."""
    path.write_bytes(content)
    try:
        with path.open("rb") as file:
            return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in deserialize(file.read())}
    except (SafetensorError, OSError, ValueError, OverflowError):
        return None


# What stands in for a token of a header's JSON, or beside it: other spellings of numbers and strings, what Python takes
# for JSON and the format does not, and the other way round.
STRANGE = (
    *("0", "1", "-0", "-1", "00", "1.0", "1e0", "0x1", "18446744073709551615", "18446744073709551616", "9" * 30),
    *("NaN", "Infinity", "-Infinity", "null", "true", "false", "None", "[]", "{}", "[0]", '{"a": 1}', "[[0]]"),
    *(
        '""',
        '"F32"',
        '"BF16"',
        '"F64"',
        '"f32"',
        '"Q"',
        '"\\u0046\\u0033\\u0032"',
        '"\\ud800"',
        '"\\ud83d\\ude00"',
        "'F32'",
    ),
    *('"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"a"', '"\\u0000"', '"\t"', "\ufeff", "\u00a0", "\x0b"),
    *(",", ":", "{", "}", "[", "]", " ", "\n", "\r\n", "//", "/**/", ""),
    *('"a":1,', '"dtype":"F32",', '"shape":[],', '"extra":[{"b":null}],', '"__metadata__":null,', '"__metadata__":{},'),
)
TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\d.+-]+|[{}\[\],:]')


def test_a_header_changed_in_any_token_is_read_like_safetensors_or_refused(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "e": torch.zeros(0, 2)}
    whole = save(tensors, {"format": "pt"})
    length = int.from_bytes(whole[:8], "little")
    tokens, data = TOKENS.findall(whole[8 : 8 + length].decode()), whole[8 + length :]
    dice = random.Random(68)
    outcomes = {True: 0, False: 0}
    stricter = []
    for _ in range(4000):
        changed = list(tokens)
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            place = dice.randrange(len(changed))
            changed[place : place + dice.randrange(2)] = [dice.choice((*STRANGE, dice.choice(tokens)))]
        text = "".join(changed).encode()
        content = len(text).to_bytes(8, "little") + text + data
        theirs = described_by_safetensors(content, tmp_path / "x.safetensors")
        try:
            layout = read(content)
        except CorruptShardError:
            if theirs is not None:
                stricter.append(text)
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        ours = {
            stored.spec.name: (
                stored.spec.dtype,
                list(stored.spec.shape),
                content[stored.offset_bytes : stored.end_bytes],
            )
            for stored in layout.tensors
        }
        assert ours == theirs, text
    assert min(outcomes.values()) > 100
    assert stricter == []


@pytest.mark.parametrize(
    "header",
    [
        '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}',
        '{"__metadata__":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        '{"dtype":"F32"}',
        '{"a":{"dtype":"F32","shape":[0],"data_offsets":[0]}}',
        '{"a":{"dtype":5,"shape":[0],"data_offsets":[0,0]}}',
        '{"a":' + "[" * 100_000,
        '{"a":' * 100_000,
    ],
)
def test_a_misplaced_description_is_refused_as_by_safetensors(header: str, tmp_path: Path) -> None:
    content = len(header).to_bytes(8, "little") + header.encode()
    assert described_by_safetensors(content, tmp_path / "x.safetensors") is None
    with pytest.raises(CorruptShardError):
        read(content)


def test_tensors_may_be_named_like_fields() -> None:
    names = ("dtype", "shape", "data_offsets")
    content = packed({name: entry(4 * i, 4 * i + 4, [1]) for i, name in enumerate(names)}, bytes(12))
    assert tuple(stored.spec.name for stored in read(content).tensors) == names


@pytest.mark.parametrize(
    "key",
    ['"data_offsets"', '"data_\\u006fffsets"'],
)
def test_more_tensors_than_are_read_are_refused_while_they_are_counted(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header_json, "MOST_TENSORS", 100)
    parts = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],{key}:[0,0]}}' for i in range(103))
    text = f"{{{parts}}}".encode()
    with pytest.raises(CheckpointError, match="more than 100 tensors"):
        read(len(text).to_bytes(8, "little") + text)


def test_more_values_than_tensors_need_are_refused_before_they_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_json, "_MOST_VALUES", 1000)
    text = b'{"t":{"dtype":"F32","shape":[' + b"0," * 1000 + b'0],"data_offsets":[0,0]}}'
    with pytest.raises(CheckpointError, match="or 1,000 values"):
        read(len(text).to_bytes(8, "little") + text)


def test_what_is_written_is_never_more_than_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MOST_TENSORS", 2)
    specs = [TensorSpec(name, "F32", (1,)) for name in "abc"]
    encode_header(specs[:2], {})
    with pytest.raises(CheckpointError, match="the most are 100,000,000 bytes and 2 tensors"):
        encode_header(specs, {})


@pytest.mark.parametrize(("depth", "is_read"), [(125, True), (126, False), (500, False)])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_an_unused_field_nests_as_deep_as_safetensors_reads(
    depth: int, is_read: bool, brackets: str, tmp_path: Path
) -> None:
    opening = "[" if brackets == "[]" else '{"[":'
    nested = opening * (depth - 1) + brackets + brackets[1] * (depth - 1)
    content = packed('{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":' + nested + "}}")
    assert (described_by_safetensors(content, tmp_path / "x.safetensors") is not None) == is_read
    if is_read:
        assert [stored.spec.name for stored in read(content).tensors] == ["a"]
    else:
        with pytest.raises(CorruptShardError, match="nests too deeply"):
            read(content)
