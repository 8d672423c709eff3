"""The Hub, through the real huggingface_hub client, against a stand-in that fails on request."""

import hashlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
from support.hub_stand_in import Cdn, Fault, HubStandIn, commit_of, sha256_of
from support.program import LIMIT_S

from int8cli.checkpoint.hub import HubOptions, HubSource, RetryPolicy
from int8cli.checkpoint.locate import open_source
from int8cli.errors import (
    AccessDeniedError,
    CorruptShardError,
    DiskSpaceError,
    IndexFileError,
    ModelNotFoundError,
    OutputError,
    SourceError,
    TransferError,
)

REPO = "org/tiny"
SHARD = "model-00001-of-00002.safetensors"
NEXT_SHARD = "model-00002-of-00002.safetensors"
QUICK = RetryPolicy(attempts=4, first_pause_s=0.01, max_pause_s=0.02)


def noise(seed: int, size: int) -> bytes:
    return hashlib.shake_256(str(seed).encode()).digest(size)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "tiny"}')
    (directory / ".gitattributes").write_text("*.safetensors filter=lfs")
    for seed, name in enumerate([SHARD, NEXT_SHARD, "pytorch_model.bin"]):
        (directory / name).write_bytes(noise(seed, 300_000 + seed))
    return directory


@pytest.fixture
def hub(model: Path) -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        hub.add_repo(REPO, model)
        yield hub


class Waits:
    """Hears of pauses."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, float]] = []

    def __call__(self, what: str, why: str, pause_s: float) -> None:
        self.seen.append((what, why, pause_s))


def source_of(hub: HubStandIn, tmp_path: Path, revision: str | None = None, repo: str = REPO, **options) -> HubSource:
    settings: dict[str, Any] = {
        "download_dir": tmp_path / "out" / "incoming",
        "endpoint": hub.endpoint,
        "cache_dir": tmp_path / "cache",
        "retry": QUICK,
        "timeout_s": 5.0,
    }
    return HubSource(repo, revision, HubOptions(**(settings | options)))


def fetched(source: HubSource, file_name: str) -> bytes:
    with source.fetch(file_name) as local:
        return local.path.read_bytes()


def wait_until(happened: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


# Repositories


def test_a_repository_has_a_commit_and_its_visible_files(hub, tmp_path):
    source = source_of(hub, tmp_path)
    identity = source.identity
    assert (identity.name, identity.revision, identity.on_hub) == (REPO, hub.repo(REPO).commit, True)
    assert source.list_files() == ("config.json", SHARD, NEXT_SHARD, "pytorch_model.bin")


def test_a_push_in_the_middle_changes_nothing(hub, model, tmp_path):
    source = source_of(hub, tmp_path)
    source.resolve()
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    (pushed / SHARD).write_bytes(b"other")
    hub.move_main(REPO, pushed)
    assert fetched(source, SHARD) == (model / SHARD).read_bytes()
    assert fetched(source_of(hub, tmp_path), SHARD) == b"other"


def test_a_revision_is_a_branch_or_a_commit(hub, tmp_path):
    branch = tmp_path / "branch"
    branch.mkdir()
    (branch / "config.json").write_text("{}")
    hub.repo(REPO).revisions["refs/pr/1"] = branch
    by_name = source_of(hub, tmp_path, "refs/pr/1")
    assert by_name.list_files() == ("config.json",)
    by_commit = source_of(hub, tmp_path, by_name.identity.revision)
    assert by_commit.identity == by_name.identity
    assert fetched(by_commit, "config.json") == b"{}"


# Reading headers


def test_a_header_costs_two_requests_no_byte_beyond_it_and_no_wait(hub, model, tmp_path):
    waits = Waits()
    source = source_of(hub, tmp_path, on_wait=waits)
    with source.open(SHARD) as file:
        assert file.read(8) == (model / SHARD).read_bytes()[:8]
        assert file.read(5000) == (model / SHARD).read_bytes()[8:5008]
    assert hub.ranges_asked(SHARD) == ["bytes=0-7", "bytes=8-5007"]
    assert hub.bytes_sent(SHARD) == 5008
    assert waits.seen == []


def test_any_place_of_a_remote_file_can_be_read(hub, model, tmp_path):
    whole = (model / SHARD).read_bytes()
    with source_of(hub, tmp_path).open(SHARD) as file:
        assert file.seek(-22, os.SEEK_END) == len(whole) - 22
        assert file.read() == whole[-22:]
        assert file.read(1) == b""
        file.seek(150_000)
        hub.requests.clear()
        assert file.read() == whole[150_000:]
        assert len(hub.of(SHARD)) == 1
        file.seek(200_000)
        assert file.read(10) == whole[200_000:200_010]
        file.seek(0)
        assert file.read() == whole


def test_a_dropped_header_read_resumes(hub, model, tmp_path):
    hub.fail(SHARD, Fault(drop_after_bytes=40_000, times=2))
    with source_of(hub, tmp_path).open(SHARD) as file:
        assert file.read(131_072) == (model / SHARD).read_bytes()[:131_072]
    assert hub.bytes_sent(SHARD) == 131_072


def test_a_header_from_a_server_without_ranges_does_not_download_the_file(model, tmp_path):
    (model / SHARD).write_bytes(noise(5, 60_000_000))
    with HubStandIn(ranges=False) as hub:
        hub.add_repo(REPO, model)
        with source_of(hub, tmp_path).open(SHARD) as file:
            assert file.read(5000) == (model / SHARD).read_bytes()[:5000]
            file.seek(50_000_000)
            with pytest.raises(SourceError, match="Range"):
                file.read(8)
        time.sleep(0.2)
        assert hub.bytes_sent(SHARD) < 20_000_000  # what lay in socket buffers, twice


def test_the_size_is_known_without_the_file(hub, tmp_path):
    source = source_of(hub, tmp_path)
    assert source.size_bytes(SHARD) == 300_000
    assert source.size_bytes("config.json") == 22
    assert hub.of(SHARD) == []


# Fetching


def test_a_fetched_file_exists_while_it_is_used_and_is_removed_afterwards(hub, model, tmp_path):
    source = source_of(hub, tmp_path)
    with source.fetch(SHARD) as local:
        assert local.path.name == SHARD
        assert local.path.read_bytes() == (model / SHARD).read_bytes()
        assert local.sha256 == hashlib.sha256((model / SHARD).read_bytes()).hexdigest()
    assert not local.path.exists()
    source.close()
    assert not (tmp_path / "out" / "incoming").exists()
    assert not (tmp_path / "cache").exists()


def test_a_file_outside_lfs_has_no_sha256(hub, tmp_path):
    with source_of(hub, tmp_path).fetch("config.json") as local:
        assert local.sha256 is None


def test_only_requested_bytes_are_transferred(hub, tmp_path):
    source = source_of(hub, tmp_path)
    fetched(source, SHARD)
    assert hub.files_asked() == {SHARD}
    assert hub.bytes_sent(SHARD) == 300_000


def test_received_bytes_are_reported_as_they_arrive(hub, tmp_path):
    heard: list[tuple[str, int]] = []
    fetched(source_of(hub, tmp_path, on_bytes=lambda name, n: heard.append((name, n))), SHARD)
    assert {name for name, _ in heard} == {SHARD}
    assert sum(n for _, n in heard) == 300_000


def test_an_empty_file_is_fetched(hub, model, tmp_path):
    (model / "empty.txt").touch()
    (model / "empty.bin").touch()
    hub.add_repo(REPO, model)
    source = source_of(hub, tmp_path)
    assert fetched(source, "empty.txt") == fetched(source, "empty.bin") == b""
    with source.open("empty.bin") as file:
        assert file.read(8) == b""


def test_no_name_leads_out_of_the_download_directory(hub, tmp_path):
    source = source_of(hub, tmp_path)
    for ask in (source.size_bytes, source.open, source.prefetch, lambda name: source.fetch(name).__enter__()):
        with pytest.raises(IndexFileError):
            ask("../../escaped")


def test_an_error_while_a_file_is_used_keeps_it_for_the_next_run(hub, tmp_path):
    source = source_of(hub, tmp_path)
    with pytest.raises(RuntimeError), source.fetch(SHARD):
        raise RuntimeError
    source.close()
    assert len(fetched(source_of(hub, tmp_path), SHARD)) == 300_000
    assert hub.bytes_sent(SHARD) == 300_000


def test_a_discarded_file_is_downloaded_again(hub, model, tmp_path):
    hub.fail(SHARD, Fault(corrupt_at=1234))
    source = source_of(hub, tmp_path)
    with source.fetch(SHARD) as local:
        assert hashlib.sha256(local.path.read_bytes()).hexdigest() != local.sha256
        source.discard(SHARD)
    assert fetched(source, SHARD) == (model / SHARD).read_bytes()
    assert hub.bytes_sent(SHARD) == 600_000


def test_a_file_in_a_subdirectory_is_fetched(hub, model, tmp_path):
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("{}")
    hub.add_repo(REPO, model)
    source = source_of(hub, tmp_path)
    assert "1_Pooling/config.json" in source.list_files()
    assert fetched(source, "1_Pooling/config.json") == b"{}"
    source.close()
    assert not (tmp_path / "out" / "incoming").exists()


def test_a_part_that_is_too_long_is_downloaded_again(hub, model, tmp_path):
    part = tmp_path / "out" / "incoming" / hub.repo(REPO).commit / f"{SHARD}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(300_001))
    assert fetched(source_of(hub, tmp_path), SHARD) == (model / SHARD).read_bytes()


@pytest.mark.parametrize("suffix", ["", ".incomplete"])
@pytest.mark.parametrize("file", [SHARD, "config.json"])
def test_what_a_power_failure_left_of_a_download_is_not_used(file, suffix, hub, model, tmp_path):
    """Nothing flushes a download: after a power failure it can have its length and other bytes."""
    left = tmp_path / "out" / "incoming" / hub.repo(REPO).commit / f"{file}{suffix}"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes((model / file).stat().st_size - bool(suffix)))
    assert fetched(source_of(hub, tmp_path), file) == (model / file).read_bytes()


def test_what_a_killed_run_has_downloaded_is_not_downloaded_again(hub, model, tmp_path):
    left = tmp_path / "out" / "incoming" / hub.repo(REPO).commit / SHARD
    left.parent.mkdir(parents=True)
    left.write_bytes((model / SHARD).read_bytes())
    assert fetched(source_of(hub, tmp_path), SHARD) == (model / SHARD).read_bytes()
    assert hub.bytes_sent(SHARD) == 0


# Temporary failures


def test_a_dropped_connection_resumes_where_it_stopped(hub, model, tmp_path):
    hub.fail(SHARD, Fault(drop_after_bytes=100_000, times=2))
    waits = Waits()
    assert fetched(source_of(hub, tmp_path, on_wait=waits), SHARD) == (model / SHARD).read_bytes()
    assert hub.ranges_asked(SHARD) == [None, "bytes=100000-", "bytes=200000-"]
    assert hub.bytes_sent(SHARD) == 300_000
    assert [(what, why) for what, why, _ in waits.seen] == [(f"{REPO}: {SHARD}", "the connection was dropped")] * 2


def test_progress_resets_the_count_of_failures(hub, model, tmp_path):
    hub.fail(SHARD, Fault(drop_after_bytes=20_000, times=12))  # three times what is allowed in a row
    assert fetched(source_of(hub, tmp_path), SHARD) == (model / SHARD).read_bytes()
    assert hub.bytes_sent(SHARD) == 300_000


def test_pauses_grow_until_it_gives_up_and_says_what_happened(hub, tmp_path):
    hub.fail(SHARD, Fault(status=503, times=99))
    waits = Waits()
    policy = RetryPolicy(attempts=5, first_pause_s=0.01, max_pause_s=0.04)
    with pytest.raises(TransferError) as caught:
        fetched(source_of(hub, tmp_path, retry=policy, on_wait=waits), SHARD)
    assert [pause_s for _, _, pause_s in waits.seen] == [0.01, 0.02, 0.04, 0.04]
    assert SHARD in str(caught.value)
    assert "503" in str(caught.value)
    assert "same command again" in caught.value.hint


def test_patience_is_counted_in_time_from_the_first_failure_in_a_row(hub, model, tmp_path):
    hub.fail(SHARD, Fault(status=503, times=30))
    patient = RetryPolicy(attempts=2, first_pause_s=0.001, max_pause_s=0.002, patience_s=3600.0)
    assert fetched(source_of(hub, tmp_path, retry=patient), SHARD) == (model / SHARD).read_bytes()
    hub.fail(NEXT_SHARD, Fault(status=503, times=9999))
    short = RetryPolicy(attempts=9999, first_pause_s=0.01, max_pause_s=0.02, patience_s=0.1)
    with pytest.raises(TransferError, match=r"failed \d+ times in a row: the server answered 503") as caught:
        fetched(source_of(hub, tmp_path, retry=short), NEXT_SHARD)
    assert "same command again" in caught.value.hint


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("on", ["GET", "HEAD"])
def test_errors_of_a_busy_server_are_retried(hub, model, tmp_path, status, on):
    hub.fail(SHARD, Fault(status=status, times=2, on=on))
    assert fetched(source_of(hub, tmp_path), SHARD) == (model / SHARD).read_bytes()


def test_the_api_is_asked_again_too(hub, tmp_path):
    hub.fail("api", Fault(status=500, times=2))
    hub.fail("api", Fault(stall_s=0.0, times=1))
    assert source_of(hub, tmp_path).list_files()


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "1"}, {"RateLimit": '"resolvers";r=0;t=1', "RateLimit-Policy": '"resolvers";q=1;w=300'}]
)
def test_the_server_decides_how_long_to_wait(hub, model, tmp_path, headers):
    hub.fail(SHARD, Fault(status=429, headers=headers))
    waits = Waits()
    began = time.monotonic()
    assert fetched(source_of(hub, tmp_path, on_wait=waits), SHARD) == (model / SHARD).read_bytes()
    assert [pause_s for _, _, pause_s in waits.seen] == [1.0]
    assert time.monotonic() - began >= 1.0


def test_a_silent_server_is_disconnected_and_asked_again(hub, model, tmp_path):
    hub.fail(SHARD, Fault(drop_after_bytes=100_000, stall_s=3.0))
    assert fetched(source_of(hub, tmp_path, timeout_s=1.0), SHARD) == (model / SHARD).read_bytes()
    assert hub.bytes_sent(SHARD) == 300_000


def test_a_server_without_ranges_is_read_from_the_start_again(model, tmp_path):
    with HubStandIn(ranges=False) as hub:
        hub.add_repo(REPO, model)
        hub.fail(SHARD, Fault(drop_after_bytes=100_000, times=2))
        assert fetched(source_of(hub, tmp_path), SHARD) == (model / SHARD).read_bytes()
        hub.fail(NEXT_SHARD, Fault(drop_after_bytes=100_000, times=99))  # the same bytes again are no progress
        with pytest.raises(TransferError):
            fetched(source_of(hub, tmp_path), NEXT_SHARD)


def test_an_unreachable_hub_is_reported(tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{held.getsockname()[1]}"
        options = HubOptions(tmp_path / "in", endpoint=nobody, retry=QUICK)
        with pytest.raises(TransferError, match="could not be reached") as caught:
            HubSource(REPO, None, options).resolve()
        assert "HF_HUB_OFFLINE=1" in caught.value.hint


def test_a_server_that_is_not_a_hub_is_reported(tmp_path):
    options = HubOptions(tmp_path / "in", endpoint="not a url", retry=QUICK)
    with pytest.raises(TransferError) as caught:
        HubSource(REPO, None, options).resolve()
    assert "HF_ENDPOINT" in caught.value.hint


def test_a_full_disk_is_an_error(hub, tmp_path):
    source = source_of(hub, tmp_path)
    with largest_file(1000), pytest.raises(DiskSpaceError, match=r"safetensors.*: not enough disk space"):
        fetched(source, SHARD)


@contextmanager
def largest_file(size_bytes):
    """Files of this process stay below a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("plant", ["symlink_to", "hardlink_to"])
def test_a_part_that_is_a_link_is_not_written_through(hub, tmp_path, plant):
    source = source_of(hub, tmp_path)
    part = tmp_path / "out" / "incoming" / str(source.identity.revision) / f"{SHARD}.incomplete"
    part.parent.mkdir(parents=True)
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    getattr(part, plant)(precious)
    assert fetched(source, SHARD) == noise(0, 300_000)
    assert precious.read_bytes() == b"mine"


@pytest.mark.parametrize("level", ["incoming", "incoming/commit"])
def test_a_download_directory_that_is_a_link_is_refused(hub, tmp_path, level):
    source = source_of(hub, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "empty").mkdir(parents=True)
    planted = tmp_path / "out" / level.replace("commit", str(source.identity.revision))
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.symlink_to(elsewhere)
    with pytest.raises(OutputError, match="is a link"):
        fetched(source, SHARD)
    source.close()
    assert [path.name for path in elsewhere.iterdir()] == ["empty"]


# Permanent failures


@pytest.mark.parametrize(
    ("repo", "revision", "error", "words"),
    [
        ("org/none", None, ModelNotFoundError, "no such repository"),
        (REPO, "v9", ModelNotFoundError, "v9"),
        ("a--b..", None, ModelNotFoundError, "not a valid name of a Hub repository"),
        ("org/private", None, ModelNotFoundError, "private"),
    ],
)
def test_missing_files_are_not_requested_twice(hub, model, tmp_path, repo, revision, error, words):
    hub.add_repo("org/private", model, token="hf_secret")
    with pytest.raises(error, match=words) as caught:
        source_of(hub, tmp_path, revision, repo).resolve()
    assert caught.value.hint or repo == "a--b.."
    assert len(hub.requests) <= 1


def test_a_missing_file_is_named(hub, tmp_path):
    source = source_of(hub, tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"model-9\.safetensors"):
        fetched(source, "model-9.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"model-9\.safetensors"):
        source.open("model-9.safetensors").read(8)


def test_a_gated_repository_is_an_error_that_says_how_to_get_access(hub, model, tmp_path):
    hub.add_repo("org/gated", model, gated=True, token="hf_secret")
    source = source_of(hub, tmp_path, repo="org/gated")
    assert SHARD in source.list_files()
    for read in (lambda: fetched(source, SHARD), lambda: source.open(SHARD).read(8)):
        with pytest.raises(AccessDeniedError, match="gated") as caught:
            read()
        assert "HF_TOKEN" in caught.value.hint


def test_the_token_opens_a_gated_repository_and_stays_with_the_hub(hub, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add_repo("org/gated", model, gated=True, token="hf_secret")
    source = source_of(hub, tmp_path, repo="org/gated")
    assert fetched(source, SHARD) == (model / SHARD).read_bytes()
    with source.open(NEXT_SHARD) as file:
        file.read(8)
    at_cdn = [request for request in hub.requests if request.host == "cdn"]
    assert len(at_cdn) == 2
    assert all(request.authorization is None for request in at_cdn)
    assert all(request.authorization for request in hub.requests if request.host == "hub")


# Storage


@pytest.mark.parametrize("cdn", get_args(Cdn))
def test_the_digest_is_the_hubs_even_after_a_redirect(cdn, model, tmp_path):
    with HubStandIn(cdn=cdn) as hub:
        hub.add_repo(REPO, model)
        with source_of(hub, tmp_path).fetch(SHARD) as local:
            assert local.sha256 == sha256_of(model / SHARD)
            assert local.path.read_bytes() == (model / SHARD).read_bytes()


# The next file


def test_the_next_file_is_fetched_while_the_current_one_is_used(hub, model, tmp_path):
    source = source_of(hub, tmp_path)
    with source.fetch(SHARD):
        source.prefetch(NEXT_SHARD)
        wait_until(lambda: hub.bytes_sent(NEXT_SHARD) == 300_001)
    assert fetched(source, NEXT_SHARD) == (model / NEXT_SHARD).read_bytes()
    assert hub.bytes_sent(NEXT_SHARD) == 300_001


def test_only_one_file_is_fetched_ahead(hub, tmp_path):
    hub.fail("*.safetensors", Fault(bytes_per_s=500_000, times=9))
    source = source_of(hub, tmp_path)
    source.prefetch(SHARD)
    source.prefetch(NEXT_SHARD)
    assert len(fetched(source, SHARD)) == 300_000
    assert hub.files_asked() == {SHARD}


def test_a_failure_in_the_background_is_raised_when_the_file_is_needed(hub, tmp_path):
    hub.fail(SHARD, Fault(status=500, times=4))
    source = source_of(hub, tmp_path)
    source.prefetch(SHARD)
    with pytest.raises(TransferError, match="500"):
        fetched(source, SHARD)
    assert len(fetched(source, SHARD)) == 300_000


def test_close_does_not_wait_for_a_long_download_and_keeps_its_part(hub, model, tmp_path):
    hub.fail(SHARD, Fault(bytes_per_s=20_000))
    source = source_of(hub, tmp_path)
    source.prefetch(SHARD)
    parts = (tmp_path / "out" / "incoming").rglob
    wait_until(lambda: any(part.stat().st_size for part in parts("*.incomplete")))
    source.close()  # the rest would take fourteen seconds
    (part,) = parts("*.incomplete")
    held = part.stat().st_size
    assert 0 < held < 300_000
    assert fetched(source_of(hub, tmp_path), SHARD) == (model / SHARD).read_bytes()
    assert hub.ranges_asked(SHARD)[-1] == f"bytes={held}-"


def test_close_ends_a_pause(hub, tmp_path):
    hub.fail(SHARD, Fault(status=503, headers={"Retry-After": "100"}))
    waiting = threading.Event()
    source = source_of(hub, tmp_path, on_wait=lambda *_: waiting.set())
    source.prefetch(SHARD)
    assert waiting.wait(LIMIT_S)
    began = time.monotonic()
    source.close()
    assert time.monotonic() - began < 50  # of the pause of a hundred seconds


# The cache


def test_keep_source_caches_files_like_huggingface_hub(hub, model, tmp_path):
    from huggingface_hub import hf_hub_download

    source = source_of(hub, tmp_path, keep_source=True)
    hub.fail(SHARD, Fault(drop_after_bytes=100_000))
    with source.fetch(SHARD) as local:
        assert local.path.read_bytes() == (model / SHARD).read_bytes()
        assert local.sha256 == hashlib.sha256((model / SHARD).read_bytes()).hexdigest()
    assert local.path.exists()
    cached = hf_hub_download(REPO, SHARD, cache_dir=tmp_path / "cache", local_files_only=True)
    assert Path(cached) == local.path
    assert hub.bytes_sent(SHARD) == 300_000
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


@pytest.mark.parametrize("keep_source", [False, True])
def test_a_file_in_the_cache_is_used_and_not_removed(hub, model, tmp_path, keep_source):
    from huggingface_hub import hf_hub_download

    cache = tmp_path / "cache"
    cached = Path(hf_hub_download(REPO, SHARD, cache_dir=cache, endpoint=hub.endpoint))
    hub.requests.clear()
    source = source_of(hub, tmp_path, keep_source=keep_source)
    assert source.size_bytes(SHARD) == 300_000
    with source.open(SHARD) as file:
        assert file.read(8) == (model / SHARD).read_bytes()[:8]
    source.prefetch(SHARD)
    with source.fetch(SHARD) as local:
        assert local.path == cached
        assert local.sha256 == hashlib.sha256((model / SHARD).read_bytes()).hexdigest()
    source.close()
    assert cached.exists()
    assert hub.files_asked() == set()


def test_a_cache_without_links_works_too(hub, model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True, raising=False)  # where the client has this setting
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_, **__: False)
    monkeypatch.setattr("huggingface_hub.file_download._are_symlinks_supported_in_dir", {})
    hub.fail(SHARD, Fault(corrupt_at=7))
    source = source_of(hub, tmp_path, keep_source=True)
    assert fetched(source, SHARD) != (model / SHARD).read_bytes()
    source.discard(SHARD)
    for again in (source, source_of(hub, tmp_path)):
        with again.fetch(SHARD) as local:
            assert not local.path.is_symlink()
            assert local.sha256 == hashlib.sha256((model / SHARD).read_bytes()).hexdigest()
            assert local.path.read_bytes() == (model / SHARD).read_bytes()


def test_a_corrupt_file_in_the_cache_is_named_and_not_deleted(hub, tmp_path):
    from huggingface_hub import hf_hub_download

    cached = Path(hf_hub_download(REPO, SHARD, cache_dir=tmp_path / "cache", endpoint=hub.endpoint))
    with pytest.raises(CorruptShardError) as caught:
        source_of(hub, tmp_path).discard(SHARD)
    assert str(cached.resolve()) in caught.value.hint
    assert cached.exists()


def test_a_corrupt_file_in_the_cache_is_downloaded_again_with_keep_source(hub, model, tmp_path):
    hub.fail(SHARD, Fault(corrupt_at=7))
    source = source_of(hub, tmp_path, keep_source=True)
    assert fetched(source, SHARD) != (model / SHARD).read_bytes()
    source.discard(SHARD)
    assert fetched(source, SHARD) == (model / SHARD).read_bytes()


def test_parts_of_another_revision_are_not_resumed(hub, model, tmp_path):
    hub.fail(SHARD, Fault(drop_after_bytes=100_000, times=1))
    hub.fail(SHARD, Fault(status=500, times=4))
    with pytest.raises(TransferError):
        fetched(source_of(hub, tmp_path), SHARD)
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    (pushed / SHARD).write_bytes(noise(9, 300_000))
    hub.move_main(REPO, pushed)
    source = source_of(hub, tmp_path)
    assert fetched(source, SHARD) == noise(9, 300_000)
    source.close()
    assert not (tmp_path / "out" / "incoming").exists()


# Through the environment, as the command runs

SCRIPT = """
import sys
from pathlib import Path
from int8cli.checkpoint.locate import open_source
from int8cli.errors import Int8cliError

model, out, keep, *files = sys.argv[1:]
try:
    source = open_source(model, revision=None, download_dir=Path(out), keep_source=keep == "keep")
    for name in files:
        with source.fetch(name) as local:
            print(name, len(local.path.read_bytes()), flush=True)
    source.close()
except Int8cliError as error:
    sys.exit(f"{type(error).__name__}: {error} ({error.hint})")
"""


def run(hub: HubStandIn, tmp_path: Path, *args: str, **env: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, args[0], str(tmp_path / "out" / "incoming"), *args[1:]],
        env=os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )


def test_the_environment_is_honoured_and_stderr_left_alone(hub, model, tmp_path):
    hub.add_repo("org/private", model, token="hf_secret")
    process = run(hub, tmp_path, "org/private", "", SHARD, HF_TOKEN="hf_secret")
    assert process.communicate(timeout=LIMIT_S) == (f"{SHARD} 300000\n", "")


@pytest.mark.parametrize("keep", ["", "keep"])
def test_after_kill_9_the_next_run_resumes_the_part(hub, tmp_path, keep):
    hub.fail(SHARD, Fault(bytes_per_s=300_000))
    process = run(hub, tmp_path, REPO, keep, SHARD)
    wait_until(lambda: hub.bytes_sent(SHARD) >= 120_000)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=LIMIT_S)
    (part,) = (path for path in tmp_path.rglob("*.incomplete") if path.is_file())
    held = part.stat().st_size
    assert held > 60_000
    again = run(hub, tmp_path, REPO, keep, SHARD)
    assert again.communicate(timeout=LIMIT_S) == (f"{SHARD} 300000\n", "")
    assert hub.ranges_asked(SHARD) == [None, f"bytes={held}-"]
    assert not part.exists()


def test_offline_serves_what_the_cache_holds(hub, tmp_path):
    kept = run(hub, tmp_path, REPO, "keep", "config.json", SHARD)
    assert kept.communicate(timeout=LIMIT_S)[1] == ""
    hub.requests.clear()
    offline = run(hub, tmp_path, REPO, "", "config.json", SHARD, NEXT_SHARD, HF_HUB_OFFLINE="1")
    out, err = offline.communicate(timeout=LIMIT_S)
    assert out == f"config.json 22\n{SHARD} 300000\n"
    assert err.startswith(f"ModelNotFoundError: {REPO}: {NEXT_SHARD} is not in the Hub cache")
    unknown = run(hub, tmp_path, "org/none", "", HF_HUB_OFFLINE="1")
    assert "org/none is not in the Hub cache" in unknown.communicate(timeout=LIMIT_S)[1]
    assert hub.requests == []


def test_an_unknown_name_suggests_a_directory(hub, model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.chdir(model.parent)
    with pytest.raises(ModelNotFoundError, match="modle") as caught:
        open_source("modle", revision=None, download_dir=tmp_path / "incoming")
    assert "On this machine there is model" in caught.value.hint


@pytest.mark.parametrize(("name", "asked"), [("modle", 2), ("models/opt", 2), ("org/name", 5)])
def test_a_name_that_may_be_a_mistyped_directory_is_not_asked_for_again_and_again(name, asked, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(RetryPolicy, "pause_s", lambda self, failures: 0.001)
    monkeypatch.chdir(tmp_path)
    for directory in ("model", "models"):
        (tmp_path / directory).mkdir()
    waits = Waits()
    with pytest.raises(TransferError, match="could not be reached") as caught:
        open_source(name, revision=None, download_dir=tmp_path / "incoming", on_wait=waits)
    assert len(waits.seen) == asked - 1
    assert str(caught.value).startswith(f"there is no directory or file {name} here") == (name != "org/name")
    assert ("On this machine there is model" in caught.value.hint) == (name == "modle")


def test_a_server_that_gives_only_commit_and_files_is_enough(hub, model, tmp_path):
    hub.terse = True
    source = source_of(hub, tmp_path)
    assert SHARD in source.list_files()
    assert source.identity.revision == commit_of(model)
