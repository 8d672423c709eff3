"""Sources in object stores, through fsspec: its memory file system, made to fail on request, and a real S3 server."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.calibration_models import make_model
from support.one_machine import ThisMachine
from support.program import LIMIT_S, Nursery, llama, outcome_of, run, start, tree, wait_until
from support.progress import CoherentProgress

import int8cli
from int8cli.checkpoint import remote
from int8cli.checkpoint.hub import HubOptions, RetryPolicy
from int8cli.checkpoint.locate import open_source
from int8cli.checkpoint.output_names import CONVERSION_FILE
from int8cli.checkpoint.remote import StoreSource
from int8cli.errors import (
    AccessDeniedError,
    CorruptShardError,
    DestinationError,
    MissingExtraError,
    ModelNotFoundError,
    OptionError,
    OutputError,
    SourceError,
    TransferError,
)
from int8cli.records.conversion import Conversion, ShardSource
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore
from int8cli.upload.shard_uploads import ShardUploads

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in range(1, 4)]
QUICK = RetryPolicy(attempts=3, first_pause_s=0.001, max_pause_s=0.002)
OPTIONS = int8cli.ConvertOptions(outliers="none", workers=1)


class Store(MemoryFileSystem):
    """Objects in memory, by addresses such as store://bucket/model. `errors` are raised by the next reads."""

    protocol = "store"
    store: dict[str, Any] = {}  # noqa: RUF012  # as in the class above: one for all instances
    pseudo_dirs = [""]  # noqa: RUF012
    errors: list[Exception] = []  # noqa: RUF012
    ranges: list[tuple[str, int | None, int | None]] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.replace("store://", "memory://", 1))
        return stripped

    on_put: Callable[[str], object] = staticmethod(lambda name: None)

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        type(self).on_put(rpath.partition("/out/")[2])
        super().put_file(lpath, rpath, *args, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.ranges.append((path.rpartition("/")[2], start, end))
        if self.errors:
            raise self.errors.pop(0)
        data: bytes = super().cat_file(path, start, end, **kwargs)
        return data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("remote") / "model", shards=3)


@pytest.fixture
def store(model: Path) -> Iterator[Store]:
    fsspec.register_implementation("store", Store, clobber=True)
    fs = Store()
    for path in model.iterdir():
        fs.pipe(f"/bucket/model/{path.name}", path.read_bytes())
    Store.ranges.clear()
    yield fs
    Store.errors.clear()
    Store.store.clear()
    Store.on_put = lambda name: None


def source_of(tmp_path: Path, url: str = "store://bucket/model", **options: Any) -> StoreSource:
    return StoreSource(url, HubOptions(tmp_path / "incoming", retry=QUICK, **options))


def test_the_result_is_that_of_the_local_directory(store: Store, model: Path, tmp_path: Path) -> None:
    int8cli.convert(model, tmp_path / "local", OPTIONS)
    int8cli.convert("store://bucket/model", tmp_path / "remote", OPTIONS)
    assert tree(tmp_path / "remote") == tree(tmp_path / "local")
    assert int8cli.verify(tmp_path / "remote", int8cli.VerifyOptions(source="store://bucket/model")).passed


def test_parts_convert_from_a_store(store: Store, model: Path, tmp_path: Path) -> None:
    int8cli.convert(model, tmp_path / "local", OPTIONS)
    for number in (2, 1):
        int8cli.convert("store://bucket/model", tmp_path / "parts", replace(OPTIONS, part=(number, 2)))
    assert tree(tmp_path / "parts") == tree(tmp_path / "local")


@pytest.fixture
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("int8cli.commands.on_ray.RayCluster", ThisMachine)


@pytest.mark.usefixtures("one_machine")
def test_the_workers_of_a_cluster_open_a_store(store: Store, model: Path, tmp_path: Path) -> None:
    int8cli.convert(model, tmp_path / "local", OPTIONS)
    int8cli.convert("store://bucket/model", tmp_path / "cluster", replace(OPTIONS, ray="local"))
    assert tree(tmp_path / "cluster") == tree(tmp_path / "local")


def test_the_plan_reads_headers_and_edges_alone(store: Store, tmp_path: Path) -> None:
    large = llama(tmp_path / "large", hidden=256, intermediate=512, vocabulary=512, shards=3)
    for path in large.iterdir():
        store.pipe(f"/bucket/large/{path.name}", path.read_bytes())
    int8cli.plan_conversion("store://bucket/large", tmp_path / "out", OPTIONS)
    read = sum((end or 0) - (start or 0) for name, start, end in store.ranges if name in SHARDS)
    edges = len(SHARDS) * 2 * (64 << 10)  # of the fingerprint
    assert 0 < read < edges + (16 << 10) < sum((large / shard).stat().st_size for shard in SHARDS) / 2
    assert not (tmp_path / "out").exists()


def test_files_are_listed_and_read_by_ranges(store: Store, model: Path, tmp_path: Path) -> None:
    store.pipe("/bucket/model/.hidden", b"x")
    store.pipe("/bucket/model/sub/file.json", b"{}")
    source = source_of(tmp_path)
    assert source.list_files() == tuple(sorted([*(path.name for path in model.iterdir()), "sub/file.json"]))
    assert source.size_bytes(SHARDS[0]) == (model / SHARDS[0]).stat().st_size
    with source.open(SHARDS[0]) as file:
        assert file.read(8) == (model / SHARDS[0]).read_bytes()[:8]
        file.seek(-4, os.SEEK_END)
        assert file.read() == (model / SHARDS[0]).read_bytes()[-4:]
    assert [(start, (end or 0) - (start or 0)) for _, start, end in store.ranges] == [
        (0, 8),
        (source.size_bytes(SHARDS[0]) - 4, 4),
    ]
    assert source.identity.name == "model"
    with pytest.raises(ModelNotFoundError, match="'nothing' is missing"):
        source.size_bytes("nothing")


def test_a_fetched_file_is_removed_after_use(store: Store, model: Path, tmp_path: Path) -> None:
    source = source_of(tmp_path)
    source.prefetch(SHARDS[1])
    with source.fetch(SHARDS[1]) as local:
        assert local.path.read_bytes() == (model / SHARDS[1]).read_bytes()
    source.close()
    assert not (tmp_path / "incoming").exists()


def test_failures_are_tried_again_and_parts_resumed(
    store: Store, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the last piece of the part, which after a power failure may be other bytes."""
    monkeypatch.setattr(remote, "_PIECE_BYTES", 600)
    waits: list[str] = []
    Store.errors[:] = [OSError("slow down"), TimeoutError()]
    with source_of(tmp_path, on_wait=lambda what, why, pause_s: waits.append(why)).fetch(SHARDS[0]) as local:
        assert local.path.read_bytes() == (model / SHARDS[0]).read_bytes()
    assert waits == ["slow down", "TimeoutError"]
    Store.errors[:] = [OSError("down")] * 3
    source = source_of(tmp_path)
    with (
        pytest.raises(TransferError, match=r"model: model-00001.*: failed 3 times in a row: down"),
        source.fetch(SHARDS[0]),
    ):
        pass
    [part] = (tmp_path / "incoming").rglob("*.incomplete")
    part.write_bytes((model / SHARDS[0]).read_bytes()[:400] + bytes(600))
    store.ranges.clear()
    with source.fetch(SHARDS[0]) as local:
        assert local.path.read_bytes() == (model / SHARDS[0]).read_bytes()
    size = (model / SHARDS[0]).stat().st_size
    assert [start for _, start, _ in store.ranges] == list(range(400, size, 600))


def test_a_part_of_a_download_is_not_what_a_process_has_left(store: Store, model: Path, tmp_path: Path) -> None:
    """What processes have left is removed when a run begins, and what the run itself goes on with is not."""
    own = tmp_path / "out/int8/incoming"
    source = StoreSource("store://bucket/model", HubOptions(own, retry=QUICK))
    Store.errors[:] = [OSError("down")] * 3
    with pytest.raises(TransferError), source.fetch(SHARDS[0]):
        pass
    (own / "0123456789abcdef").mkdir()
    before = [path.name for path in own.rglob("*.incomplete")]
    RecordStore(tmp_path / "out").unfinished.remove_left_over()
    assert len(before) == 1
    assert [path.name for path in own.rglob("*.incomplete")] == before
    assert not (own / "0123456789abcdef").exists()


def test_an_object_that_is_replaced_is_an_error(store: Store, model: Path, tmp_path: Path) -> None:
    source = source_of(tmp_path)
    assert {source.size_bytes(shard) for shard in SHARDS[:2]} <= {path.stat().st_size for path in model.iterdir()}
    store.pipe(f"/bucket/model/{SHARDS[0]}", (model / SHARDS[0]).read_bytes())
    with pytest.raises(CorruptShardError, match="changed while it was read"), source.fetch(SHARDS[0]):
        pass
    store.pipe(f"/bucket/model/{SHARDS[1]}", b"short")
    with pytest.raises(CorruptShardError, match="changed while it was read"), source.fetch(SHARDS[1]):
        pass
    assert not list((tmp_path / "incoming").rglob("*.safetensors*"))


def test_refusals_are_not_tried_again(store: Store, tmp_path: Path) -> None:
    source = source_of(tmp_path)
    Store.errors[:] = [PermissionError("Access Denied")]
    with pytest.raises(AccessDeniedError, match="Access Denied"), source.fetch(SHARDS[0]):
        pass
    with pytest.raises(ModelNotFoundError, match="no such directory"):
        source_of(tmp_path, "store://bucket/nothing")
    store.rm(f"/bucket/model/{SHARDS[0]}")
    with pytest.raises(ModelNotFoundError, match="no such object"), source.fetch(SHARDS[0]):
        pass


def test_addresses_that_cannot_be_opened(tmp_path: Path) -> None:
    for url, error, message in [
        ("nope://bucket/model", ModelNotFoundError, "Protocol not known: nope"),
        ("https://host/model", ModelNotFoundError, "no such file"),
        ("store://bucket/model", SourceError, "has no revision 'main'"),
    ]:
        revision = "main" if error is SourceError else None
        with pytest.raises(error, match=message):
            open_source(url, revision=revision, download_dir=tmp_path)


@pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_missing_driver_is_named(tmp_path: Path) -> None:
    outcome = run("convert", "s3://bucket/model", cwd=tmp_path)
    assert outcome.code == 1
    assert outcome.err.startswith("error: s3://bucket/model: Install s3fs to access S3\nhint: Install the package")
    with pytest.raises(MissingExtraError):
        open_source("s3://bucket/model", revision=None, download_dir=tmp_path)


# Outputs


def objects(store: Store, directory: str) -> dict[str, bytes]:
    return {path.removeprefix(f"/{directory}/"): store.cat_file(path) for path in store.find(f"/{directory}")}


def files_in(directory: Path) -> dict[str, bytes]:
    """The files of a conversion without what is of this machine alone."""
    found = {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    return {name: data for name, data in found.items() if not name.startswith(("int8/uploads/", "int8/push.json"))}


def streaming(**changes: Any) -> int8cli.ConvertOptions:
    return replace(OPTIONS, push_to="store://bucket/out", keep_output=False, retry_for=0.0, **changes)


def test_a_conversion_is_streamed_from_store_to_store(store: Store, model: Path, tmp_path: Path) -> None:
    int8cli.convert(model, tmp_path / "local", OPTIONS)
    order: list[str] = []
    Store.on_put = lambda name: order.append(name)
    int8cli.convert("store://bucket/model", tmp_path / "out", streaming())
    assert objects(store, "bucket/out") == files_in(tmp_path / "local")
    assert order[:4] == ["int8/conversion.json", *SHARDS]
    assert order[-1] == "config.json"
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert int8cli.status(tmp_path / "out").shards_removed == 3
    order.clear()
    int8cli.convert("store://bucket/model", tmp_path / "out", streaming())
    assert not set(order) & set(SHARDS)
    assert objects(store, "bucket/out") == files_in(tmp_path / "local")


def test_a_finished_conversion_is_pushed_to_a_store(store: Store, model: Path, tmp_path: Path) -> None:
    int8cli.convert(model, tmp_path / "local", OPTIONS)
    pushed = int8cli.push(tmp_path / "local", "store://bucket/out")
    assert (pushed.repository, pushed.revision) == ("store://bucket/out", "")
    assert objects(store, "bucket/out") == files_in(tmp_path / "local")
    int8cli.push(tmp_path / "local", "store://bucket/out", int8cli.PushOptions(retry_for=0.0))
    with pytest.raises(int8cli.Int8cliError, match="no such option"):
        int8cli.push(tmp_path / "local", "store://bucket/out", int8cli.PushOptions(private=True))


class AtOnce(ShardUploads):
    """Uploads and removes what is here before it says so: the earliest moment for its thread."""

    def resume(self, conversion: Conversion, shards: Collection[ShardSource]) -> Mapping[str, ShardRecord]:
        found = super().resume(conversion, shards)
        with self._changed:
            assert self._changed.wait_for(lambda: not self._busy, LIMIT_S)
        return found


def test_an_interrupted_stream_goes_on_and_what_was_lost_is_made_again(
    store: Store, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int8cli.convert(model, tmp_path / "local", OPTIONS)

    def refuse_second(name: str) -> None:
        if name == SHARDS[1]:
            raise PermissionError("Access Denied")

    Store.on_put = refuse_second
    with pytest.raises(AccessDeniedError, match=f"out: {SHARDS[1]}: Access Denied"):
        int8cli.convert(model, tmp_path / "out", streaming())
    assert not store.exists("/bucket/out/config.json")
    order: list[str] = []
    Store.on_put = lambda name: order.append(name)
    store.pipe(f"/bucket/out/{SHARDS[0]}", (tmp_path / "local" / SHARDS[0]).read_bytes())  # somebody replaced it
    monkeypatch.setattr("int8cli.commands.push.ShardUploads", AtOnce)
    int8cli.convert(model, tmp_path / "out", streaming())
    assert sorted(name for name in order if name in SHARDS) == SHARDS
    assert objects(store, "bucket/out") == files_in(tmp_path / "local")


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("changes", "smooths"),
    [
        ({"smooth": "auto", "outliers": "activations"}, True),
        ({"smooth": "statistics.safetensors"}, True),
        ({"layout": "compressed-tensors", "outliers": "auto"}, True),
        ({"layout": "compressed-tensors", "outliers": "auto", "smooth": "none"}, False),
        ({"layout": "compressed-tensors", "outliers": "auto", "inputs": "none"}, True),
        ({"layout": "compressed-tensors"}, False),
    ],
)
def test_what_is_smoothed_keeps_its_shards(changes: dict[str, Any], smooths: bool, model: Path, tmp_path: Path) -> None:
    options = replace(streaming(), **changes)
    if not smooths:
        assert not int8cli.plan_conversion(model, tmp_path / "out", options).survey.smooth
        return
    with pytest.raises(OptionError, match="needs its shards until it is finished") as caught:
        int8cli.plan_conversion(model, tmp_path / "out", options)
    assert caught.value.option == "keep_output"


def test_a_source_is_not_replaced_by_its_conversion(store: Store, model: Path, tmp_path: Path) -> None:
    """Its shards have the same names."""
    before = objects(store, "bucket/model")
    for source in (model, "store://bucket/model"):
        with pytest.raises(DestinationError, match=f"holds another model: {SHARDS[0]}"):
            int8cli.convert(source, tmp_path / "out", replace(streaming(), push_to="store://bucket/model"))
        int8cli.convert(source, tmp_path / "local", OPTIONS)
        with pytest.raises(DestinationError, match=f"holds another model: {SHARDS[0]}"):
            int8cli.push(tmp_path / "local", "store://bucket/model/")
    assert objects(store, "bucket/model") == before


def test_no_loader_opens_a_model_that_is_half_replaced(store: Store, model: Path, tmp_path: Path) -> None:
    int8cli.convert(model, tmp_path / "first", streaming())
    assert store.exists("/bucket/out/config.json")

    def refuse_second(name: str) -> None:
        if name == SHARDS[1]:
            raise PermissionError("Access Denied")

    Store.on_put = refuse_second
    with pytest.raises(AccessDeniedError):
        int8cli.convert(model, tmp_path / "second", streaming(threshold=5.0, skip=("*.q_proj",)))
    assert not store.exists("/bucket/out/config.json")
    Store.on_put = lambda name: None
    int8cli.convert(model, tmp_path / "second", streaming(threshold=5.0, skip=("*.q_proj",)))
    int8cli.convert(model, tmp_path / "local", replace(OPTIONS, threshold=5.0, skip=("*.q_proj",)))
    assert objects(store, "bucket/out") == files_in(tmp_path / "local")


def broken(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


# A driver's method, and what it returns or raises.
DRIVERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "find raises": ("find", broken(KeyError("items"))),
    "find knows nothing": ("find", lambda *_, **__: None),
    "find lists names": ("find", lambda *_, **__: ["/bucket/model/config.json"]),
    "find describes nothing": ("find", lambda *_, **__: {"/bucket/model/config.json": None}),
    "find names nothing": ("find", lambda *_, **__: {None: {"type": "file"}}),
    "info raises": ("info", broken(AttributeError("headers"))),
    "info knows no size": ("info", lambda *_, **__: {}),
    "a size of another type": ("info", lambda *_, **__: {"size": []}),
    "a negative size": ("info", lambda *_, **__: {"size": -1}),
    "a read raises": ("cat_file", broken(NotImplementedError())),
    "a read asserts": ("cat_file", broken(AssertionError("offset"))),
    "nothing is read": ("cat_file", lambda *_, **__: None),
    "text is read": ("cat_file", lambda *_, **__: "{}"),
}


@pytest.mark.parametrize("case", DRIVERS)
def test_a_driver_that_breaks_its_word_is_an_error(
    case: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, does = DRIVERS[case]
    monkeypatch.setattr(Store, method, does)
    with pytest.raises(TransferError, match=r"the file system that fsspec has for it failed: \w+Error"):
        int8cli.convert("store://bucket/model", tmp_path / "out", replace(OPTIONS, retry_for=0.0))


@pytest.mark.parametrize("error", [TypeError("path"), OSError("no route"), RuntimeError("kernel")])
def test_a_driver_that_cannot_begin_is_an_error(
    error: Exception, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsspec.core.url_to_fs", broken(error))
    with pytest.raises(TransferError, match=r"store://user:…@bucket/model: cannot be opened: .*path|route|kernel"):
        int8cli.convert("store://user:secret@bucket/model", tmp_path / "out", OPTIONS)


def test_no_password_is_shown(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "find", broken(PermissionError("store://user:secret@bucket refuses")))
    with pytest.raises(AccessDeniedError) as caught:
        source_of(tmp_path, "store://user:secret@bucket/model")
    assert "secret" not in f"{caught.value} {caught.value.hint}"
    assert "user:…@bucket" in str(caught.value)


@pytest.mark.parametrize("address", ["s3://", "store:///", "memory://"])
def test_an_address_of_nothing_is_none(address: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        int8cli.convert(address, tmp_path / "out", OPTIONS)
    with pytest.raises(OptionError, match="not an address"):
        int8cli.convert(tmp_path, tmp_path / "out", replace(OPTIONS, push_to=address))


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "int8/report.json", "int8/conversion.json"])
def test_a_link_to_a_file_outside_is_not_pushed(name: str, store: Store, model: Path, tmp_path: Path) -> None:
    int8cli.convert(model, tmp_path / "local", OPTIONS)
    (tmp_path / "local" / name).rename(tmp_path / "secret")
    (tmp_path / "local" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=f"{name} is a link to .*secret, outside"):
        int8cli.push(tmp_path / "local", "store://bucket/out")
    assert not store.exists("/bucket/out/config.json")


@pytest.mark.parametrize("change", ["lose", "add"])
def test_a_manifest_of_other_files_is_not_pushed(change: str, store: Store, model: Path, tmp_path: Path) -> None:
    int8cli.convert(model, tmp_path / "local", OPTIONS)
    path = tmp_path / "local/int8/files.json"
    document = json.loads(path.read_text())
    [license_file] = (each for each in document["files"] if each["file"] == "LICENSE")
    (tmp_path / "local/notes.txt").write_text((model / "LICENSE").read_text())
    if change == "lose":
        document["files"].remove(license_file)
    else:
        document["files"].append({**license_file, "file": "notes.txt"})
    path.write_text(json.dumps(document))
    with pytest.raises(OutputError, match=r"name different files: (LICENSE|notes\.txt) is in one only"):
        int8cli.push(tmp_path / "local", "store://bucket/out")
    assert not store.exists("/bucket/out/config.json")


@pytest.mark.parametrize("name", ["README.md", SHARDS[0], "config.json"])
def test_a_file_that_changes_while_it_is_pushed_is_an_error(
    name: str, store: Store, model: Path, tmp_path: Path
) -> None:
    int8cli.convert(model, tmp_path / "local", OPTIONS)

    def change(written: str) -> None:
        if written == name:
            data = (tmp_path / "local" / name).read_bytes()
            (tmp_path / "local" / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    Store.on_put = change
    with pytest.raises(CorruptShardError, match=f"{name}: changed while it was read"):
        int8cli.push(tmp_path / "local", "store://bucket/out", int8cli.PushOptions(retry_for=0.0))


@pytest.mark.parametrize("place", ["out", "out/within", ".", "link"])
def test_an_output_is_not_pushed_to_itself(place: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "out").mkdir()
    address = f"local://{tmp_path / place}"
    with pytest.raises(DestinationError, match="itself, or one of them is inside the other"):
        int8cli.convert(model, tmp_path / "out", replace(OPTIONS, push_to=address))
    int8cli.convert(model, tmp_path / "out", OPTIONS)
    before = tree(tmp_path / "out")
    with pytest.raises(DestinationError, match="itself, or one of them is inside the other"):
        int8cli.push(tmp_path / "out", address)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG])
def test_what_does_not_pass_is_not_waited_for(number: int, store: Store, model: Path, tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise OSError(number, os.strerror(number))

    int8cli.convert(model, tmp_path / "local", OPTIONS)
    Store.on_put = refuse
    with pytest.raises(TransferError, match=os.strerror(number)) as caught:  # with three hours of patience
        int8cli.push(tmp_path / "local", "store://bucket/out")
    assert "Make room" in caught.value.hint


class Directories(MemoryFileSystem):
    """A file system with directories, as SMB or DBFS, whose driver makes those that it has not found.

    Each is made by another process at the moment before. `number` is what the driver tells of that.
    """

    protocol = "directories"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    number: int | None = None
    refused: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.replace("directories://", "memory://", 1))
        return stripped

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        parent = rpath.rpartition("/")[0]
        if not self.isdir(parent):
            if not self.exists(parent):
                super().makedirs(parent, exist_ok=True)
            self.refused.append(parent)
            raise FileExistsError(*(() if self.number is None else (self.number,)), parent)
        super().put_file(lpath, rpath, *args, **kwargs)


@pytest.fixture
def directories() -> Iterator[Directories]:
    fsspec.register_implementation("directories", Directories, clobber=True)
    fs = Directories()
    fs.mkdir("/bucket")
    yield fs
    Directories.store.clear()
    Directories.pseudo_dirs[:] = [""]
    Directories.refused.clear()


@pytest.mark.parametrize("number", [None, errno.EEXIST])
def test_a_directory_that_two_make_at_once_is_no_error(
    number: int | None, directories: Directories, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Directories, "number", number)
    int8cli.convert(model, tmp_path / "out", replace(OPTIONS, push_to="directories://bucket/out", retry_for=0.0))
    assert directories.refused == ["/bucket/out/int8", "/bucket/out/int8/records"]
    assert objects(directories, "bucket/out") == files_in(tmp_path / "out")


@pytest.mark.parametrize("number", [None, errno.EEXIST])
def test_a_file_in_the_place_of_a_directory_is_not_waited_for(
    number: int | None, directories: Directories, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Directories, "number", number)
    directories.pipe("/bucket/out/int8", b"a file")
    with pytest.raises(TransferError, match="out: int8/") as found:
        int8cli.convert(model, tmp_path / "out", replace(OPTIONS, push_to="directories://bucket/out"))
    assert found.value.hint is not None
    assert "Something else is already at that path" in found.value.hint


def test_another_description_in_a_store_is_not_read_whole(store: Store, model: Path, tmp_path: Path) -> None:
    int8cli.convert(model, tmp_path / "local", OPTIONS)
    store.pipe(f"/bucket/out/{CONVERSION_FILE}", b"0" * 100_000)
    int8cli.push(tmp_path / "local", "store://bucket/out")
    assert 100_000 not in [end for _, _, end in Store.ranges]
    assert objects(store, "bucket/out") == files_in(tmp_path / "local")


def test_a_record_of_an_upload_names_no_file_twice(store: Store, model: Path, tmp_path: Path) -> None:
    int8cli.convert(model, tmp_path / "out", streaming())
    path = next(iter((tmp_path / "out/int8/uploads").iterdir()))
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "files": record["files"] * 2}))
    with pytest.raises(OutputError, match="files names a file twice"):
        int8cli.status(tmp_path / "out")


def test_shards_that_only_the_store_has_are_named(store: Store, model: Path, tmp_path: Path) -> None:
    int8cli.convert(model, tmp_path / "out", streaming())
    progress = CoherentProgress()
    int8cli.convert(model, tmp_path / "out", replace(streaming(), keep_output=True), progress=progress)
    assert f"{tmp_path / 'out'} lacks 3 of 3 shards: only store://bucket/out has them" in progress.notes


def test_another_model_in_a_store_is_left_alone(store: Store, model: Path, tmp_path: Path) -> None:
    store.pipe("/bucket/out/pytorch_model.bin", b"weights")
    with pytest.raises(DestinationError, match=r"store://bucket/out holds another model: pytorch_model.bin"):
        int8cli.convert(model, tmp_path / "out", streaming())
    for options in (replace(OPTIONS, push_to="me/model"), replace(OPTIONS, push_to_hub="store://bucket/out")):
        with pytest.raises(int8cli.Int8cliError, match=r"is (not )?an address"):
            int8cli.convert(model, tmp_path / "out", options)


@pytest.mark.usefixtures("one_machine")
def test_a_cluster_writes_to_a_store(store: Store, model: Path, tmp_path: Path) -> None:
    int8cli.convert(model, tmp_path / "local", OPTIONS)
    order: list[str] = []
    Store.on_put = lambda name: order.append(name)
    int8cli.convert("store://bucket/model", tmp_path / "out", streaming(ray="local"))
    assert objects(store, "bucket/out") == files_in(tmp_path / "local")
    assert (order[:4], order[-1]) == ([CONVERSION_FILE, *SHARDS], "config.json")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_parts_write_to_a_store(store: Store, model: Path, tmp_path: Path) -> None:
    int8cli.convert(model, tmp_path / "local", OPTIONS)
    order: list[str] = []
    Store.on_put = lambda name: order.append(name)
    for number in (3, 1, 2):
        result = int8cli.convert("store://bucket/model", tmp_path / "out", streaming(part=(number, 3)))
        assert result.to_publish
        assert not list((tmp_path / "out").glob("*.safetensors"))
    assert sorted(order) == [CONVERSION_FILE, *SHARDS]
    assert not int8cli.convert("store://bucket/model", tmp_path / "out", streaming(finish=True)).to_publish
    assert objects(store, "bucket/out") == files_in(tmp_path / "local")
    assert order[-1] == "config.json"
    assert sorted(order) == sorted([*files_in(tmp_path / "local"), CONVERSION_FILE])


def test_a_shard_that_another_process_sent_and_removed_meanwhile(store: Store, model: Path, tmp_path: Path) -> None:
    """One part runs twice at the same time."""
    int8cli.convert(model, tmp_path / "local", OPTIONS)
    options = streaming(part=(1, 1))
    overtaken: list[str] = []

    def overtake(name: str) -> None:
        if name in SHARDS and not overtaken:
            overtaken.append(name)
            int8cli.convert("store://bucket/model", tmp_path / "out", options)

    Store.on_put = overtake
    int8cli.convert("store://bucket/model", tmp_path / "out", options)
    assert overtaken == SHARDS[:1]
    int8cli.convert("store://bucket/model", tmp_path / "out", streaming(finish=True))
    assert objects(store, "bucket/out") == files_in(tmp_path / "local")


def test_a_fallback_pushes_too(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model turns out not to fit into memory; columns come from the weights then, and go to the same place."""
    small = make_model("llama", tmp_path / "model", max_shard_size="12KB")
    int8cli.convert(small, tmp_path / "local", replace(OPTIONS, outliers="weights"))
    monkeypatch.setattr("int8cli.outliers.calibrate.available_bytes", lambda device: 1)
    options = replace(OPTIONS, outliers="auto", push_to="store://bucket/out", retry_for=0.0)
    progress = CoherentProgress()
    int8cli.convert(small, tmp_path / "out", options, progress=progress)
    assert any("falling back to the weights" in note for note in progress.notes)
    assert objects(store, "bucket/out") == files_in(tmp_path / "local")


# A real S3 server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment that leads to a server."""
    if find_spec("moto") is None or find_spec("s3fs") is None:
        pytest.skip("needs s3fs and moto: see make test-s3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + LIMIT_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key-of-the-tests",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.send_signal(signal.SIGTERM)
    server.wait(LIMIT_S)


def test_a_model_in_s3_is_converted(
    s3: dict[str, str], model: Path, nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3")
    fs.mkdir("models")
    fs.put(f"{model}/", "models/llama", recursive=True)
    assert nursery.run("convert", model, "-o", "local", "--outliers", "none", "-q", cwd=tmp_path).code == 0
    command = ("convert", "s3://models/llama", "-o", "remote", "--outliers", "none")
    process = start(*command, cwd=tmp_path, env=s3)
    wait_until(lambda: (tmp_path / "remote/int8/incoming").exists() or process.poll() is not None)
    process.kill()
    assert outcome_of(process).code == -signal.SIGKILL
    outcome = run(*command, cwd=tmp_path, env=s3)
    assert outcome.code == 0, outcome.err
    local, remote = tree(tmp_path / "local"), tree(tmp_path / "remote")
    naming = ("int8/", "README.md")
    assert {name: data for name, data in local.items() if not name.startswith(naming)} == {
        name: data for name, data in remote.items() if not name.startswith(naming)
    }
    assert local.keys() == remote.keys()
    assert "secret-of-the-tests" not in outcome.out + outcome.err
    assert run("verify", "remote", "--source", "s3://models/llama", cwd=tmp_path, env=s3).code == 0
    streamed = (*command[:2], "-o", "streamed", *command[4:], "--push-to", "s3://models/int8", "--no-keep-output")
    outcome = run(*streamed, cwd=tmp_path, env=s3)
    assert outcome.code == 0, outcome.err
    fs.invalidate_cache()
    pushed = {path.removeprefix("models/int8/"): fs.cat_file(path) for path in fs.find("models/int8")}
    assert pushed == files_in(tmp_path / "remote")
    assert not list((tmp_path / "streamed").glob("*.safetensors"))
    for which in (["--part", "2/2"], ["--part", "1/2"], ["--finish"]):
        in_parts = (*command[:2], "-o", "parts", *command[4:], "--push-to", "s3://models/parts", "--no-keep-output")
        outcome = run(*in_parts, *which, cwd=tmp_path, env=s3)
        assert outcome.code == 0, outcome.err
    fs.invalidate_cache()
    assert {path.removeprefix("models/parts/"): fs.cat_file(path) for path in fs.find("models/parts")} == pushed
    denied = run("convert", "s3://nowhere/llama", "-o", "nothing", cwd=tmp_path, env=s3)
    assert denied.code == 1
    assert "error: s3://nowhere/llama" in denied.err
