"""The room for downloads: how many shards of the source are on the disk at once, by who converts them."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from heapq import nlargest
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from support.calibration_models import make_model, save_tokenizer, some_text
from support.hub_stand_in import HubStandIn
from support.one_machine import Session, Tell, ThisMachine
from support.program import llama, tree

from int8cli import ConvertOptions, SilentProgress, convert, plan_conversion
from int8cli.checkpoint import locate
from int8cli.checkpoint.hub import HubOptions
from int8cli.checkpoint.hub.source import HubSource
from int8cli.errors import DiskSpaceError
from int8cli.planning.room import Room, room_needed
from int8cli.records.unfinished import UnfinishedFiles
from int8cli.workers.ray_cluster import RayCluster
from int8cli.workers.ray_session import TaskNeeds

REPO = "org/model"
GIB = 1 << 30
TOKEN = "0123456789abcdef"  # of the process that converts a part


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in shards of several sizes, and a text for it."""
    directory = tmp_path_factory.mktemp("room")
    (directory / "words.txt").write_text(some_text().text)
    return make_model("llama", directory / "model", max_shard_size="12KB")


@pytest.fixture
def asked(published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """What each conversion needed of the disk, in the order in which it asked. The model is on the Hub."""
    found: list[int] = []

    def noted(*args: Any) -> tuple[Room, ...]:
        rooms = room_needed(*args)
        found.append(sum(room.needed_bytes for room in rooms))
        return rooms

    monkeypatch.setattr("int8cli.conversion.room.room_needed", noted)
    monkeypatch.setattr("int8cli.commands.on_ray.RayCluster", ThisMachine)
    with HubStandIn() as hub:
        hub.add_repo(REPO, published)
        cache = tmp_path / "cache"
        monkeypatch.setattr(locate, "HubOptions", partial(HubOptions, endpoint=hub.endpoint, cache_dir=cache))
        yield found


def sizes_of(published: Path) -> list[int]:
    return [path.stat().st_size for path in sorted(published.glob("*.safetensors"))]


def test_every_worker_has_a_download_and_the_next_one_is_fetched(
    asked: list[int], published: Path, tmp_path: Path
) -> None:
    sizes = sizes_of(published)
    two = max(one + other for one, other in pairwise(sizes))
    convert(REPO, tmp_path / "one", ConvertOptions(outliers="none", workers=1))
    alone = asked[0]
    asked.clear()
    convert(REPO, tmp_path / "several", ConvertOptions(outliers="none", workers=2))
    assert asked[0] - alone == sum(nlargest(3, sizes)) - two > 0
    assert tree(tmp_path / "several") == tree(tmp_path / "one")


def test_every_worker_of_a_cluster_has_a_download_and_so_has_the_run_of_the_model(
    asked: list[int], published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {}
    for slots in (1, 4):
        monkeypatch.setattr(ThisMachine, "slots", slots)
        asked.clear()
        text = published.parent / "words.txt"
        options = ConvertOptions(outliers="activations", text=text, tokens=48, sequence_length=16, ray="local")
        convert(REPO, tmp_path / str(slots), options)
        needed[slots] = asked[1], asked[-1]  # before the first shard, and when the run of the model asks
    sizes = sizes_of(published)
    assert needed[4][0] - needed[1][0] == sum(nlargest(4, sizes)) - max(sizes)
    assert needed[4][1] - needed[4][0] == needed[1][1] - needed[1][0] >= max(sizes)
    assert tree(tmp_path / "4") == tree(tmp_path / "1")


@pytest.mark.parametrize("outliers", ["none", "activations"])
def test_a_dry_run_shows_the_room_of_all_tasks_of_a_cluster(
    outliers: str, asked: list[int], published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThisMachine, "slots", 4)
    options = ConvertOptions(outliers=outliers, tokens=48, sequence_length=16, ray="local")
    if outliers == "activations":
        options = replace(options, text=published.parent / "words.txt")
    plan = plan_conversion(REPO, tmp_path / "out", options)
    convert(REPO, tmp_path / "out", options)
    needed = sum(room.needed_bytes for room in plan.needs.disks)
    if outliers == "none":
        assert needed == asked[-1]
    else:  # how many shards the model reads at once is known once it is built
        two = max(one + other for one, other in pairwise(sizes_of(published)))
        assert asked[1] < needed == asked[1] + two < asked[-1]


def test_a_run_of_the_model_that_begins_again_needs_no_room_for_what_is_finished(
    asked: list[int], published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine is lost after it has told of the first shard, which is converted before it begins again."""

    class LosesTheModel(Session):
        def lead(self, name: str, task: Callable[[Tell], Any], needs: object) -> None:
            def tell(item: Any) -> None:
                self._on_told(item)
                if "released" in repr(item):
                    raise KeyboardInterrupt

            def lost() -> Any:
                with pytest.raises(KeyboardInterrupt):
                    task(tell)
                super(LosesTheModel, self).lead(name, task, needs)
                return {}

            self._tasks.append((name, lost))

    monkeypatch.setattr(ThisMachine, "tasks", LosesTheModel)
    text = published.parent / "words.txt"
    options = ConvertOptions(outliers="activations", text=text, tokens=48, sequence_length=16, ray="local")
    convert(REPO, tmp_path / "out", options)
    outputs = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert asked[-2] - asked[-1] >= min(outputs)


@pytest.mark.parametrize("how", ["plain", "part", "cluster"])
def test_what_a_killed_run_left_is_no_obstacle(
    how: str, asked: list[int], published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk with just the room, the same command goes on: its own unfinished files and downloads count as free."""
    output = tmp_path / "out"
    options = {
        "plain": ConvertOptions(outliers="none", workers=1),
        "part": ConvertOptions(outliers="none", workers=1, part=(1, 1)),
        "cluster": ConvertOptions(outliers="none", ray="local"),
    }[how]
    convert(REPO, tmp_path / "whole", options)
    size_bytes = asked[0]

    def disk_of_that_size(directory: Path) -> int:
        shards = [path for path in output.rglob("*.safetensors*") if path.is_file()] if output.exists() else []
        return size_bytes - sum(path.stat().st_blocks * 512 for path in shards)

    class Killed(BaseException):
        """As by SIGKILL: nothing is tidied up."""

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("int8cli.planning.room.free_bytes", disk_of_that_size)
    with monkeypatch.context() as patch:
        patch.setattr("int8cli.checkpoint.writer.ShardWriter.commit", killed)
        patch.setattr("int8cli.checkpoint.writer.ShardWriter.abandon", lambda _: None)
        patch.setattr(UnfinishedFiles, "remove_partial_files", lambda _: None)
        with pytest.raises(Killed):
            convert(REPO, output, options)
    left = [path for path in (output / "int8").rglob("*.safetensors*") if path.is_file()]
    assert {path.relative_to(output / "int8").parts[0] for path in left} == {"partial", "incoming"}
    convert(REPO, output, options)
    assert tree(output) == tree(tmp_path / "whole")


NONE = ConvertOptions(outliers="none", workers=1)
HOW = {
    "one": NONE,
    "two workers": replace(NONE, workers=2),
    "part": replace(NONE, part=(1, 1)),
    "cluster": replace(NONE, ray="local"),
    "keeps": replace(NONE, keep_source=True),
}
EARLIER = {"none": (), "first": (1, 2), "last": (3, 4, 5, 6), "all": (1, 2, 3, 4, 5, 6), "begun": (-2, -6)}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubStandIn, Path]]:
    """A model on the Hub whose shards are much larger than its records."""
    model = llama(tmp_path_factory.mktemp("large") / "model", layers=5, hidden=256, intermediate=512, shards=6)
    with HubStandIn() as hub:
        hub.add_repo(REPO, model)
        yield hub, model


def used_bytes(disk: Path) -> int:
    """What the files on a disk have, without what the many small ones waste."""
    total = 0
    for path, _, names in os.walk(disk):
        for name in names:
            with suppress(FileNotFoundError):  # a thread that fetches has just given it another name
                total += os.lstat(Path(path, name)).st_size
    return total


def most_used(
    disk: Path, output: Path, options: ConvertOptions, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int, list[str]]:
    """Convert on a disk that has just the room that is asked for. Returns its size, the most that was on it, all notes.

    That is as much as was there before and, each time that room was asked for, what was missing.
    """
    size_bytes = 0
    asked: list[Room] = []
    most: list[int] = []
    notes: list[str] = []

    def noted(*args: Any) -> tuple[Room, ...]:
        asked.extend(found := room_needed(*args))
        return found

    class Watches(SilentProgress):
        def advance(self, *args: Any) -> None:
            most.append(used_bytes(disk))

        def done(self, *args: Any) -> None:
            most.append(used_bytes(disk))

        def note(self, message: str) -> None:
            notes.append(message)

    with monkeypatch.context() as patch:
        patch.setattr("int8cli.conversion.room.room_needed", noted)
        patch.setattr("int8cli.planning.room.free_bytes", lambda _: size_bytes - used_bytes(disk))
        while True:
            try:
                convert(REPO, output, options, progress=Watches())
            except DiskSpaceError:
                size_bytes += asked[-1].needed_bytes - asked[-1].free_bytes
            else:
                return size_bytes, max(most), notes


@pytest.mark.parametrize(
    ("how", "earlier"),
    [
        *(("one", each) for each in EARLIER),
        ("two workers", "last"),
        ("part", "last"),
        ("part", "begun"),
        ("cluster", "none"),
        ("cluster", "last"),
        ("keeps", "last"),
        ("keeps", "begun"),
    ],
)
def test_a_run_takes_no_more_than_it_asks_for(
    how: str, earlier: str, large: tuple[HubStandIn, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk with just the room that is asked for, beside downloads of earlier runs: negative where half is there.

    They are resumed or removed, and take their place on the disk until then.
    """
    hub, model = large
    disk = tmp_path / "disk"
    output = disk / "out"
    options = HubOptions(
        download_dir=output / "int8/incoming" / (TOKEN if how == "part" else ""),
        endpoint=hub.endpoint,
        cache_dir=disk / "cache",
        keep_source=how == "keeps",
    )
    source = HubSource(REPO, None, options)
    for number in EARLIER[earlier]:
        shard = model / f"model-{abs(number):05}-of-00006.safetensors"
        part, place = source.downloads(shard.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        data = shard.read_bytes()
        (place if number > 0 else part).write_bytes(data if number > 0 else data[: len(data) // 2])
    monkeypatch.setattr("int8cli.commands.in_parts.new_token", lambda: TOKEN)
    monkeypatch.setattr("int8cli.commands.on_ray.RayCluster", ThisMachine)
    monkeypatch.setattr(locate, "HubOptions", partial(HubOptions, endpoint=hub.endpoint, cache_dir=disk / "cache"))
    size_bytes, most_bytes, _ = most_used(disk, output, HOW[how], monkeypatch)
    assert most_bytes <= size_bytes
    assert not (output / "int8/incoming").exists()


class StopError(Exception):
    """Ends a run in the middle."""


class Stops(SilentProgress):
    """Ends a run when it begins with a part of a task."""

    def __init__(self, task: str, part: str) -> None:
        self._place = task, part

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
        if (task, part) == self._place:
            raise StopError


@pytest.fixture(scope="module")
def in_order(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubStandIn, Path]]:
    """A model on the Hub with a shard for each block, and a text for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, tie_word_embeddings=False, **sizes)).bfloat16()
    directory = tmp_path_factory.mktemp("in_order")
    (directory / "words.txt").write_text(some_text().text)
    model.save_pretrained(directory / "model", max_shard_size="1400KB")
    save_tokenizer(directory / "model")
    with HubStandIn() as hub:
        hub.add_repo(REPO, directory / "model")
        yield hub, directory


LAYER = "model.layers.{}"
SHARD = "model-0000{}-of-00006.safetensors"
# Where an earlier run ended, and what became of what it had saved.
ENDED = {
    "not begun": (None, ""),
    "in a block": (("calibrate", LAYER.format(3)), ""),
    "in a block, which is lost": (("calibrate", LAYER.format(3)), "lost"),
    "in a block, which cannot be read": (("calibrate", LAYER.format(3)), "damaged"),
    "in the last block, which is lost": (("calibrate", LAYER.format(5)), "lost"),
    "in a shard": (("convert", SHARD.format(3)), ""),
    "in a shard, whose columns are lost": (("convert", SHARD.format(5)), "lost"),
    "in a shard, whose columns cannot be read": (("convert", SHARD.format(5)), "damaged"),
}


@pytest.mark.parametrize("ended", ENDED)
def test_a_run_of_the_model_takes_no_more_than_it_asks_for(
    ended: str, in_order: tuple[HubStandIn, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it resumes, beside the downloads of the earlier run, which it reads at their turn or not at all."""
    hub, directory = in_order
    disk = tmp_path / "disk"
    output = disk / "out"
    monkeypatch.setattr(locate, "HubOptions", partial(HubOptions, endpoint=hub.endpoint, cache_dir=disk / "cache"))
    options = ConvertOptions(
        outliers="activations", text=directory / "words.txt", tokens=32, sequence_length=16, workers=1
    )
    place, fate = ENDED[ended]
    if place is not None:
        with pytest.raises(StopError):
            convert(REPO, output, options, progress=Stops(*place))
        left = list((output / "int8/incoming").rglob("*.safetensors*"))
        assert left
    calibration = output / "int8/calibration"
    if fate == "lost":
        rmtree(calibration)
    elif fate == "damaged":
        for path in calibration.rglob("*.pt"):
            path.write_bytes(b"damaged")
    size_bytes, most_bytes, notes = most_used(disk, output, options, monkeypatch)
    assert most_bytes <= size_bytes
    assert any("starting over" in note for note in notes) == (fate == "damaged")
    assert not (output / "int8/incoming").exists()


class Machines(RayCluster):
    """Machines that a cluster was told of, and no cluster."""

    def __init__(self, *resources: dict[str, float]) -> None:
        self._resources = resources

    def _nodes(self) -> list[dict[str, Any]]:
        return [{"Resources": each} for each in self._resources]


def test_a_machine_with_cores_and_without_memory_counts_for_nothing() -> None:
    """The head of a cluster often has many cores and no room."""
    cluster = Machines({"CPU": 64, "memory": 1 * GIB}, {"CPU": 8, "memory": 40 * GIB}, {"CPU": 4, "memory": 9 * GIB})
    needs = TaskNeeds(1, 4 * GIB)
    assert cluster.most_cores(TaskNeeds(0, 4 * GIB)) == 8
    assert cluster.most_cores(TaskNeeds(0, 50 * GIB)) == 0
    cluster.needs = needs
    assert cluster.slots == 8 + 2
    cluster.needs = TaskNeeds(3, GIB)
    assert cluster.slots == 1 + 2 + 1
    assert cluster.offers(TaskNeeds(8, 40 * GIB))
    assert not cluster.offers(TaskNeeds(9, 2 * GIB))


def test_a_machine_without_gpus_counts_for_nothing_where_one_is_needed() -> None:
    cluster = Machines({"CPU": 64, "memory": GIB}, {"CPU": 8, "memory": GIB, "GPU": 2})
    assert cluster.most_cores(TaskNeeds(0, 1, 1)) == 8
    cluster.needs = TaskNeeds(1, 1, 1)
    assert cluster.slots == 2
