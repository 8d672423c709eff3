"""Converting from the Hub, as a user runs it, against a stand-in that fails on request."""

import json
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.hub_stand_in import Fault, HubStandIn
from support.program import CONVERT, Nursery, Outcome, llama, tree, wait_until

REPO = "org/model"
SHARD = "model-00002-of-00004.safetensors"
SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 1.3 MB in four shards: more than one read-ahead each."""
    directory = tmp_path_factory.mktemp("published") / "model"
    llama(directory, layers=4, hidden=128, intermediate=256, vocabulary=512, shards=4)
    (directory / "pytorch_model.bin").write_bytes(b"the same weights once more")
    return directory


@pytest.fixture(scope="module")
def reference(published: Path, nursery: Nursery) -> dict[str, bytes]:
    """What the conversion of the local directory writes."""
    assert nursery.run(*CONVERT, published, "-o", "reference", "-q", cwd=published.parent).code == 0
    return tree(published.parent / "reference")


class User:
    """Somebody with an empty home and this Hub."""

    def __init__(self, hub: HubStandIn, nursery: Nursery, home: Path) -> None:
        self.hub = hub
        self.home = home
        self.output = home / "model-int8"
        self._nursery = nursery

    def environment(self, **changes: str) -> dict[str, str]:
        return {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.home / "hf"), **changes}

    def start(self, *args: str, **changes: str):
        return self._nursery.start(*CONVERT, *args, cwd=self.home, env=self.environment(**changes))

    def convert(self, *args: str, **changes: str) -> Outcome:
        return self.start(*args, **changes).wait()


@pytest.fixture
def hub(published: Path) -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        hub.add_repo(REPO, published)
        yield hub


@pytest.fixture
def user(hub: HubStandIn, nursery: Nursery, tmp_path: Path) -> User:
    return User(hub, nursery, tmp_path)


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    """What does not depend on where the source was: all but the files that name it."""
    naming = ("int8/", "README.md")
    return {name: data for name, data in files.items() if not name.startswith(naming)}


def assert_converted(user: User, reference: dict[str, bytes]) -> None:
    written = tree(user.output)
    assert weights(written) == weights(reference)
    assert written.keys() == reference.keys()


def transferred_over(hub: HubStandIn, published: Path, file: str) -> int:
    """Bytes of a file that were sent beyond one whole transfer and the header's read-ahead."""
    size = (published / file).stat().st_size
    return hub.bytes_sent(file) - size - min(size, 128 << 10)


# Results


def test_the_result_is_that_of_the_local_directory(
    user: User, hub: HubStandIn, published: Path, reference: dict[str, bytes]
) -> None:
    outcome = user.convert(REPO, "--json")
    assert outcome.code == 0, outcome.err
    assert_converted(user, reference)
    commit = hub.repo(REPO).commit
    report = json.loads(outcome.out)
    assert (report["model"], report["revision"]) == (REPO, commit)
    local = json.loads(reference["int8/report.json"])
    assert {**report, "model": "model", "revision": None} == local
    conversion = json.loads((user.output / "int8/conversion.json").read_text())
    assert conversion["source"] == {"name": REPO, "revision": commit, "on_hub": True}
    card = (user.output / "README.md").read_text()
    assert f"base_model: {REPO}" in card
    assert commit in card
    for number, shard in enumerate(SHARDS, 1):
        record = json.loads((user.output / f"int8/records/model-0000{number}-of-00004.json").read_text())
        assert record["source_sha256"] is not None
        assert transferred_over(hub, published, shard) <= 0


def test_only_what_is_needed_is_fetched(user: User, hub: HubStandIn) -> None:
    outcome = user.convert(REPO, "--json")
    assert hub.bytes_sent("pytorch_model.bin") == 0
    assert {"file": "pytorch_model.bin", "reason": "duplicate of the safetensors"} in json.loads(outcome.out)[
        "passed_over"
    ]


def test_a_dry_run_fetches_headers_and_config_and_writes_nothing(user: User, hub: HubStandIn, published: Path) -> None:
    outcome = user.convert(REPO, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    assert plan["needs"]["download_bytes"] == sum((published / shard).stat().st_size for shard in SHARDS)
    assert all(hub.bytes_sent(shard) <= 128 << 10 for shard in SHARDS)
    fetched = {request.file for request in hub.requests if request.bytes_sent}
    assert fetched == {*SHARDS, "config.json", "model.safetensors.index.json"}
    assert not user.output.exists()
    assert not any(path.is_file() for path in user.home.rglob("*"))
    assert user.convert(REPO, "-q").code == 0
    written = sum(path.stat().st_size for path in user.output.glob("*.safetensors"))
    assert plan["output_bytes"] == written


def test_a_bin_repository_converts(
    user: User, hub: HubStandIn, published: Path, tmp_path: Path, nursery: Nursery
) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(published / "config.json", pickled)
    tensors = {name: tensor for shard in SHARDS for name, tensor in load_file(published / shard).items()}
    torch.save(tensors, pickled / "pytorch_model.bin")
    hub.add_repo("org/pickled", pickled)
    outcome = user.convert("org/pickled", "-q")
    assert outcome.code == 0, outcome.err
    assert nursery.run(*CONVERT, pickled, "-o", "local", "-q", cwd=tmp_path).code == 0
    assert weights(tree(tmp_path / "pickled-int8")) == weights(tree(tmp_path / "local"))


def test_a_branch_a_tag_and_a_commit_can_be_named(user: User, hub: HubStandIn, tmp_path: Path) -> None:
    branch = llama(tmp_path / "branch", shards=1, seed=7)
    hub.repo(REPO).revisions["v1.0"] = branch
    outcome = user.convert(REPO, "--revision", "v1.0", "--json")
    assert outcome.code == 0, outcome.err
    commit = json.loads(outcome.out)["revision"]
    again = user.convert(REPO, "--revision", commit, "--json")
    assert "1 of 1 shards already converted" in again.err


# The disk


def source_shards_present(output: Path) -> set[str]:
    return {path.name.removesuffix(".incomplete") for path in output.glob("int8/incoming/*/*.safetensors*")}


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
def test_only_shards_in_flight_are_on_the_disk(
    workers: list[str], user: User, hub: HubStandIn, published: Path, reference: dict[str, bytes]
) -> None:
    hub.fail("*.safetensors", Fault(times=100, bytes_per_s=1_500_000))
    most: list[set[str]] = [set()]
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            most[0] = max(most[0], source_shards_present(user.output), key=len)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        outcome = user.convert(REPO, *workers)
    finally:
        over.set()
        watcher.join()
    assert outcome.code == 0, outcome.err
    assert 1 <= len(most[0]) <= 2 + len(workers) // 2
    assert_converted(user, reference)
    assert not (user.output / "int8/incoming").exists()


def test_cached_shards_are_used_by_a_second_conversion(
    user: User, hub: HubStandIn, published: Path, reference: dict[str, bytes]
) -> None:
    assert user.convert(REPO, "--keep-source", "-q").code == 0
    assert_converted(user, reference)
    snapshot = user.home / "hf/hub/models--org--model/snapshots" / hub.repo(REPO).commit
    assert all((snapshot / shard).read_bytes() == (published / shard).read_bytes() for shard in SHARDS)
    sent = {shard: hub.bytes_sent(shard) for shard in SHARDS}
    outcome = user.convert(REPO, "-o", "second", "-q")
    assert outcome.code == 0, outcome.err
    assert {shard: hub.bytes_sent(shard) for shard in SHARDS} == sent
    assert all((snapshot / shard).is_file() for shard in SHARDS), "the cache is not ours to empty"
    offline = user.convert(REPO, "-o", "third", "-q", HF_HUB_OFFLINE="1")
    assert offline.code == 0, offline.err
    assert tree(user.home / "second") == tree(user.output)
    # Offline the cache is all that is known of the repository: what was not fetched cannot be named as left behind.
    assert weights(tree(user.home / "third")) == weights(reference)


def test_offline_without_a_cache_says_so(user: User, hub: HubStandIn) -> None:
    outcome = user.convert(REPO, HF_HUB_OFFLINE="1")
    assert outcome.code == 1
    assert "offline" in outcome.err
    assert "HF_HUB_OFFLINE" in outcome.err
    assert "Traceback" not in outcome.err
    assert not user.output.exists()
    assert not hub.requests


# A bad network


@pytest.mark.parametrize(
    "fault",
    [
        Fault(drop_after_bytes=140_000, times=3),
        Fault(drop_after_bytes=200_000, stall_s=0.1),
        Fault(status=429, headers={"Retry-After": "0"}, times=2),
        Fault(status=503),
        Fault(status=500),
    ],
    ids=lambda fault: f"{fault.status or 'drop'}-{fault.times}",
)
def test_temporary_failures_transfer_no_byte_twice(
    fault: Fault, user: User, hub: HubStandIn, published: Path, reference: dict[str, bytes]
) -> None:
    hub.fail("*.safetensors", fault)
    outcome = user.convert(REPO)
    assert outcome.code == 0, outcome.err
    assert "trying again" in outcome.err
    assert_converted(user, reference)
    for shard in SHARDS:
        assert transferred_over(hub, published, shard) <= 128 << 10, shard


def test_a_server_that_stops_answering_is_asked_again(
    user: User, hub: HubStandIn, published: Path, reference: dict[str, bytes]
) -> None:
    hub.fail(SHARD, Fault(drop_after_bytes=150_000, stall_s=4))
    outcome = user.convert(REPO, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert outcome.code == 0, outcome.err
    assert "stopped sending data" in outcome.err
    assert_converted(user, reference)


def test_a_file_that_disappears_is_an_error_and_the_next_run_resumes(
    user: User, hub: HubStandIn, reference: dict[str, bytes]
) -> None:
    hub.fail("tokenizer_config.json", Fault(status=404))
    outcome = user.convert(REPO)
    assert (outcome.code, outcome.out) == (1, "")
    assert re.search(r"^error: .*tokenizer_config\.json.*\nhint: ", outcome.err, re.MULTILINE)
    assert not (user.output / "config.json").exists()
    assert user.convert(REPO).code == 0
    assert_converted(user, reference)


def test_bytes_that_changed_in_transit_are_fetched_again(
    user: User, hub: HubStandIn, published: Path, reference: dict[str, bytes]
) -> None:
    hub.fail(SHARD, Fault(corrupt_at=180_000))
    outcome = user.convert(REPO)
    assert outcome.code == 0, outcome.err
    assert f"{SHARD}: differs from what the Hub published" in outcome.err
    assert_converted(user, reference)


def test_bytes_that_change_each_time_are_an_error(user: User, hub: HubStandIn) -> None:
    hub.fail(SHARD, Fault(corrupt_at=180_000, times=100))
    outcome = user.convert(REPO)
    assert (outcome.code, outcome.out) == (1, "")
    assert re.search(rf"^error: {SHARD}: its sha256 differs from the one", outcome.err, re.MULTILINE)
    assert "hint:" in outcome.err
    assert not (user.output / SHARD).exists()
    assert not any((user.output / "int8/partial").glob("*"))


def test_corrupt_bytes_in_the_part_of_an_earlier_run_are_not_used(
    user: User, hub: HubStandIn, published: Path, reference: dict[str, bytes]
) -> None:
    hub.fail(SHARD, Fault(corrupt_at=180_000, times=2))
    assert user.convert(REPO).code == 1
    outcome = user.convert(REPO)
    assert outcome.code == 0, outcome.err
    assert_converted(user, reference)


def test_a_copied_file_that_arrives_damaged_is_removed(
    user: User, hub: HubStandIn, published: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    hub.fail("tokenizer_config.json", Fault(drop_after_bytes=3))
    outcome = user.convert(REPO)
    assert outcome.code == 0, outcome.err
    assert_converted(user, reference)


# Kills


def test_a_killed_transfer_resumes_where_it_stopped(
    user: User, hub: HubStandIn, published: Path, reference: dict[str, bytes]
) -> None:
    hub.fail(SHARD, Fault(times=3, bytes_per_s=300_000))  # two for the header, one for the transfer
    child = user.start(REPO)

    def half_way() -> bool:
        parts = list(user.output.glob(f"int8/incoming/*/{SHARD}.incomplete"))
        return any(part.stat().st_size > 150_000 for part in parts)

    wait_until(half_way)
    child.signal(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
    (part,) = user.output.glob(f"int8/incoming/*/{SHARD}.incomplete")
    held = part.stat().st_size
    outcome = user.convert(REPO)
    assert outcome.code == 0, outcome.err
    assert f"bytes={held}-" in hub.ranges_asked(SHARD)
    assert_converted(user, reference)


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_any_instant_leave_no_trace(
    seed: int, user: User, hub: HubStandIn, published: Path, reference: dict[str, bytes]
) -> None:
    hub.fail("*.safetensors", Fault(times=10_000, bytes_per_s=3_000_000))
    chance = random.Random(seed)
    for _ in range(5):
        child = user.start(REPO)
        wait_until((user.output / "int8").exists)
        time.sleep(chance.random())
        child.signal(signal.SIGKILL)
        child.wait()
        for name, data in weights(tree(user.output)).items():
            assert Path(name).name.startswith(".") or data == reference[name], f"{name} is not whole"
    outcome = user.convert(REPO)
    assert outcome.code == 0, outcome.err
    assert_converted(user, reference)


def test_shards_that_a_killed_run_fetched_needlessly_are_removed(
    user: User, hub: HubStandIn, published: Path, reference: dict[str, bytes]
) -> None:
    assert user.convert(REPO).code == 0
    leftover = user.output / "int8/incoming" / hub.repo(REPO).commit / SHARD
    leftover.parent.mkdir(parents=True)
    shutil.copy(published / SHARD, leftover)
    assert user.convert(REPO).code == 0
    assert_converted(user, reference)


def test_an_outage_longer_than_the_patience_says_that_the_same_command_resumes(
    user: User, hub: HubStandIn, reference: dict[str, bytes]
) -> None:
    hub.fail(SHARDS[3], Fault(status=503, times=9999, on="GET"))
    outcome = user.convert(REPO, "--retry-for", "1s")
    assert outcome.code == 1
    assert "the server answered 503" in outcome.err
    assert outcome.err.endswith("hint: Run the same command again: it resumes where this run stopped.\n")
    hub.recover()
    outcome = user.convert(REPO)
    assert outcome.code == 0, outcome.err
    assert_converted(user, reference)


# Revisions


def test_a_push_between_two_runs_is_detected(
    user: User, hub: HubStandIn, published: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    old = hub.repo(REPO).commit
    hub.fail(SHARDS[3], Fault(corrupt_at=180_000, times=2))
    assert user.convert(REPO).code == 1
    hub.move_main(REPO, llama(tmp_path / "pushed", seed=9))
    before = tree(user.output)
    refused = user.convert(REPO)
    assert refused.code == 1
    assert f"revision '{old}'" in refused.err
    assert tree(user.output) == before
    outcome = user.convert(REPO, "--revision", old)
    assert outcome.code == 0, outcome.err
    assert "shards already converted" in outcome.err
    assert_converted(user, reference)


# Access


def test_missing_and_foreign_files_are_clear_errors(user: User, hub: HubStandIn, published: Path) -> None:
    hub.add_repo("org/gated", published, gated=True, token="hf_key")
    hub.add_repo("org/private", published, token="hf_key")
    expected = {
        ("org/missing",): "no such repository",
        (REPO, "--revision", "nope"): "no such revision",
        ("org/gated",): "gated",
        ("org/private",): "private",
    }
    for args, words in expected.items():
        outcome = user.convert(*args)
        assert (outcome.code, outcome.out) == (1, ""), args
        assert re.match("error: .*\nhint: .*\n$", outcome.err), outcome.err
        assert words in outcome.err
    assert not list(user.home.glob("*-int8"))


def test_a_token_opens_a_gated_repository(
    user: User, hub: HubStandIn, published: Path, reference: dict[str, bytes]
) -> None:
    hub.add_repo("org/gated", published, gated=True, token="hf_key")
    outcome = user.convert("org/gated", "-o", "model-int8", HF_TOKEN="hf_key")
    assert outcome.code == 0, outcome.err
    assert_converted(user, reference)
    assert "hf_key" not in outcome.err + outcome.out
    assert not any(b"hf_key" in data for data in tree(user.output).values())


def test_an_interrupted_transfer_ends_at_once_and_can_be_resumed(
    user: User, hub: HubStandIn, reference: dict[str, bytes]
) -> None:
    hub.fail(SHARD, Fault(times=2, bytes_per_s=200_000))
    child = user.start(REPO)
    wait_until(lambda: list(user.output.glob(f"int8/incoming/*/{SHARD}.incomplete")))
    child.signal(signal.SIGINT)
    outcome = child.wait()
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert user.convert(REPO).code == 0
    assert_converted(user, reference)
