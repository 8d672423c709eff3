"""What the driver of a cluster does, and what a worker does, without Ray: `make test-ray` has the real one."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.calibration_models import make_model, some_text
from support.one_machine import Session, Tell, ThisMachine
from support.program import Nursery, llama, tree
from support.progress import CoherentProgress

from int8cli import ConvertOptions, InspectOptions, convert, inspect_outliers, plan_conversion
from int8cli.cli.optional_value import RAY
from int8cli.conversion.worker_job import WorkerJob, _attempts
from int8cli.errors import ClusterError, DiskSpaceError, OutputInUseError
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.outliers.statistics_file import save_statistics
from int8cli.records.conversion import ShardSource
from int8cli.records.part import new_token
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore
from int8cli.records.upload_record import UploadRecord
from int8cli.report.plan import plan_to_json, show_plan
from int8cli.workers.processes import OnBytes
from int8cli.workers.ray_session import TaskNeeds, _Machines

NONE = ConvertOptions(outliers="none")


@pytest.fixture(autouse=True)
def _one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("int8cli.commands.on_ray.RayCluster", ThisMachine)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that can be run, in many shards, and what one process makes of it."""
    root = tmp_path_factory.mktemp("cluster")
    make_model("llama", root / "model", max_shard_size="12KB")
    (root / "words.txt").write_text(some_text().text)
    convert(root / "model", root / "one", running(root))
    return root


def running(root: Path, **changes: Any) -> ConvertOptions:
    """The options of a conversion that runs the model, and smooths."""
    text = root / "words.txt"
    return ConvertOptions(outliers="activations", smooth="auto", text=text, tokens=48, sequence_length=16, **changes)


def on_cluster(root: Path) -> ConvertOptions:
    return running(root, ray="local")


def test_a_task_that_no_machine_can_run_any_more_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines may be away for some time; then the error says what is lacking."""
    clock = [0.0]
    monkeypatch.setattr("int8cli.workers.ray_session.time.monotonic", lambda: clock[0])
    small, large = TaskNeeds(1, 10), TaskNeeds(60, 10)
    there = {small, large}
    machines = _Machines(lambda needs: needs in there)

    def after(seconds: float) -> None:
        clock[0] += seconds
        machines.check({small, large})

    for change, pauses in ((set(), [40, 500]), ({large}, [40]), (set(), [40, 590])):
        there.intersection_update({small})
        there.update(change)
        for pause in pauses:
            after(pause)
    with pytest.raises(ClusterError, match=r"no machine of the cluster has 60 cores, .* any more"):
        after(31)


# The address


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("m --ray", "m --ray=here"),
        ("--ray m", "--ray=here m"),
        ("--ray s3://bucket/m -o out", "--ray=here s3://bucket/m -o out"),
        ("m --ray -o out", "m --ray=here -o out"),
        ("--ray auto m", "--ray auto m"),
        ("--ray local m", "--ray local m"),
        ("--ray node1:6379 m", "--ray node1:6379 m"),
        ("--ray [::1]:6379 m", "--ray [::1]:6379 m"),
        ("--ray ray://node1:10001 m", "--ray ray://node1:10001 m"),
        ("--ray=node1 m", "--ray=node1 m"),
        ("-- --ray", "-- --ray"),
    ],
)
def test_an_address_may_be_left_out(words: str, completed: str) -> None:
    """Typer has no options whose value may be left out. What follows is one only if it has the form of an address."""
    assert list(RAY.completed(words.split())) == completed.split()


def test_the_command_line_takes_it_without_an_address(root: Path, nursery: Nursery, tmp_path: Path) -> None:
    assert "--ray [ADDRESS]" in nursery.run("convert", "--help", cwd=tmp_path).out
    command = ("convert", "--ray", root / "model", "-o", "out", "--outliers", "none")
    outcome = nursery.run(*command, cwd=tmp_path, env={"RAY_ADDRESS": "127.0.0.1:1"})
    assert outcome.code == 1, outcome
    assert "error: a cluster needs Ray" in outcome.err or "error: no Ray cluster at 'here'" in outcome.err


# The model is run for the columns


def test_shards_are_converted_as_the_run_of_the_model_releases_them(root: Path, tmp_path: Path) -> None:
    progress = CoherentProgress()
    convert(root / "model", tmp_path / "out", on_cluster(root), progress=progress)
    assert progress.under_way() == []
    assert tree(tmp_path / "out") == tree(root / "one")


@pytest.mark.parametrize("smooth", ["none", "auto"])
def test_a_budget_is_shared_out_when_the_model_has_run_to_its_end(smooth: str, root: Path, tmp_path: Path) -> None:
    """No shard is released before. Likewise with the statistics of such a run, which all workers are told of."""
    text = root / "words.txt"
    options = ConvertOptions(
        outliers="activations", outlier_budget=0.02, smooth=smooth, text=text, tokens=48, sequence_length=16
    )
    one = convert(root / "model", tmp_path / "one", options).report
    assert len({len(layer.stored.columns) for layer in one.layers if layer.stored is not None}) > 1
    convert(root / "model", tmp_path / "out", replace(options, ray="local"))
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


@pytest.mark.parametrize("budget", [None, 0.02])
def test_statistics_choose_for_every_worker_and_every_part(budget: float | None, root: Path, tmp_path: Path) -> None:
    inspected = InspectOptions(text=root / "words.txt", tokens=48, sequence_length=16, work_dir=tmp_path / "work")
    statistics = inspect_outliers(root / "model", inspected)
    assert isinstance(statistics, OutlierStatistics)
    save_statistics(statistics, tmp_path / "statistics.safetensors")
    options = ConvertOptions(outliers=tmp_path / "statistics.safetensors", outlier_budget=budget)
    convert(root / "model", tmp_path / "one", options)
    convert(root / "model", tmp_path / "out", replace(options, ray="local"))
    assert tree(tmp_path / "out") == tree(tmp_path / "one")
    for number in (2, 1):
        convert(root / "model", tmp_path / "parts", replace(options, part=(number, 2)))
    assert tree(tmp_path / "parts") == tree(tmp_path / "one")


def test_an_interrupted_driver_resumes_the_run_of_the_model(root: Path, tmp_path: Path) -> None:
    class Interrupts(CoherentProgress):
        def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
            if part == "model.layers.1":  # the first one is saved by then
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(root / "model", tmp_path / "out", on_cluster(root), progress=Interrupts())
    progress = CoherentProgress()
    convert(root / "model", tmp_path / "out", on_cluster(root), progress=progress)
    assert any("blocks already run" in note for note in progress.notes)
    assert tree(tmp_path / "out") == tree(root / "one")


@pytest.mark.parametrize("times", [0, 2])
def test_what_is_told_may_be_lost_or_come_again(
    times: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the actor with the reports is lost, or a run of the model after it has told of a shard."""

    class Unreliable(Session):
        def lead(self, name: str, task: Callable[[Tell], Any], needs: object) -> None:
            def tell(item: Any) -> None:
                for _ in range(times if "released" in repr(item) else 1):
                    self._on_told(item)

            self._tasks.append((name, lambda: task(tell)))

    monkeypatch.setattr(ThisMachine, "tasks", Unreliable)
    progress = CoherentProgress()
    convert(root / "model", tmp_path / "out", on_cluster(root), progress=progress)
    shards = {path.name for path in (root / "model").glob("*.safetensors")}
    assert {name for name in progress.outcomes if name.endswith(".safetensors")} == shards
    assert tree(tmp_path / "out") == tree(root / "one")


def test_a_run_of_the_model_waits_for_one_that_was_lost(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock may outlive its machine for a while."""
    lock = tmp_path / "out/int8/calibration/blocks.lock"
    lock.parent.mkdir(parents=True)
    held = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    with monkeypatch.context() as patch:
        patch.setattr("int8cli.conversion.worker_job.LATE_S", 0.0)
        with pytest.raises(OutputInUseError, match="running this model"):
            convert(root / "model", tmp_path / "out", on_cluster(root))
    waited: list[float] = []

    def let_go(pause_s: float) -> None:
        if pause_s == 0.25:  # the lock's own pause is shorter
            os.close(held)
            waited.append(pause_s)

    monkeypatch.setattr("int8cli.conversion.worker_job.LOOK_AGAIN_S", 0.25)
    monkeypatch.setattr("int8cli.conversion.worker_job.time.sleep", let_go)
    convert(root / "model", tmp_path / "out", on_cluster(root))
    assert waited
    assert tree(tmp_path / "out") == tree(root / "one")


def test_room_is_asked_for_before_the_model_is_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def require_room(*args: Any) -> None:
        asked.append(args[5] if len(args) > 5 else None)
        if len(args) > 5:
            raise DiskSpaceError("full")

    for module in ("convert", "room"):
        monkeypatch.setattr(f"int8cli.conversion.{module}.require_room", require_room)
    with pytest.raises(DiskSpaceError):
        convert(root / "model", tmp_path / "out", on_cluster(root))
    assert asked[-1] == 0  # nothing is downloaded from a directory
    assert not list((tmp_path / "out").glob("*.safetensors"))


# What is declared and shown


BLOCK = 1 << 19  # elements
ALONE = 325_000_000  # bytes of a worker beside its buffers


@pytest.mark.parametrize(
    ("smooth", "threads", "a_thread"),
    [
        ("none", 1, 21 * BLOCK),
        ("exact", 1, 29 * BLOCK),
        ("fine", 1, 37 * BLOCK),
        ("fine", 4, 37 * BLOCK),
    ],
)
def test_the_memory_of_a_shard_is_declared_as_it_is_smoothed(
    smooth: str, threads: int, a_thread: int, root: Path, tmp_path: Path
) -> None:
    options = replace(on_cluster(root), smooth=smooth, threads=threads)
    cluster = plan_conversion(root / "model", tmp_path / "out", options).needs.cluster
    assert cluster is not None
    assert cluster.shard == TaskNeeds(threads, ALONE + threads * a_thread)


def test_what_is_stored_transposed_takes_tiles_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    tensors = {"h.0.mlp.c_fc.weight": torch.ones(8, 16), "h.0.mlp.c_fc.bias": torch.ones(16)}
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    options = ConvertOptions(outliers="none", ray="local", threads=2)
    cluster = plan_conversion(tmp_path / "model", tmp_path / "out", options).needs.cluster
    assert cluster is not None
    assert cluster.shard.memory_bytes == ALONE + 2 * (21 + 8) * BLOCK + 2 * (1 << 24)


def test_a_task_has_the_threads_that_are_declared(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the machine that drives it."""
    threads: list[int] = []

    class Notes(Session):
        def start(self, name: str, task: Any) -> None:
            threads.append(task.args[0].options.threads)
            super().start(name, task)

    monkeypatch.setattr(ThisMachine, "tasks", Notes)
    monkeypatch.setattr("int8cli.commands.parallelism.usable_cores", lambda: 64)
    convert(root / "model", tmp_path / "out", replace(NONE, ray="local"))
    assert set(threads) == {1}


def test_a_dry_run_shows_what_the_tasks_of_a_cluster_need(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ThisMachine, "slots", 4)
    plan = plan_conversion(root / "model", tmp_path / "out", on_cluster(root))
    assert not (tmp_path / "out").exists()
    cluster = plan.needs.cluster
    assert cluster is not None
    assert cluster.model is not None
    found = plan_to_json(plan.survey, plan.needs, plan.settings, plan.ways)["needs"]["cluster"]
    assert found == {"shards_at_once": 4, "shard": asdict(cluster.shard), "model": asdict(cluster.model)}
    show_plan(plan.survey, plan.needs, plan.output, plan.settings, plan.ways)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("cluster")]
    sizes = [f"{needs.memory_bytes:,}" for needs in (cluster.shard, cluster.model)]
    assert [line[1] for line in lines] == sizes
    assert " ".join(lines[0]).endswith("1 core for each of up to 4 shards at once")
    assert " ".join(lines[1]).endswith("1 core for a run of the model")
    alone = plan_conversion(root / "model", tmp_path / "out", running(root))
    assert alone.needs.cluster is None
    assert plan_to_json(alone.survey, alone.needs)["needs"]["cluster"] is None


def test_a_dry_run_falls_back_where_no_machine_can_run_the_model(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThisMachine, "offers", lambda self, needs: needs.memory_bytes < 500_000_000)
    progress = CoherentProgress()
    options = replace(on_cluster(root), outliers="auto", smooth=None, text=None)
    plan = plan_conversion(root / "model", tmp_path / "out", options, progress=progress)
    assert plan.settings.outliers == "weights"
    assert plan.needs.cluster is not None
    assert plan.needs.cluster.model is None
    assert any("falling back" in note for note in progress.notes)


# Bad days


@pytest.mark.parametrize("lost", [1, 3])
def test_what_lost_workers_left_is_removed_with_their_shard(
    lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each, an output of the full size and a download. The disk must not fill up with them."""
    model = llama(tmp_path / "model", shards=3)
    convert(model, tmp_path / "one", NONE)
    output = tmp_path / "out"
    seen: list[int] = []
    beside: list[Path] = []  # what there was while the last attempt worked

    class LosesWorkers(Session):
        """The first attempts at each shard end after they have made files; nothing of them is tidied up."""

        def start(self, name: str, task: Callable[[OnBytes], Any]) -> None:
            super().start(name, partial(self._attempts, task))

        def _attempts(self, task: Callable[[OnBytes], Any], on_bytes: OnBytes) -> Any:
            for _ in range(lost):
                token: list[str] = []
                with monkeypatch.context() as patch:
                    patch.setattr(WorkerJob, "_opened", partialmethod(_lost, token))
                    with pytest.raises(KeyboardInterrupt):
                        task(on_bytes)
                for place in ("partial", "incoming"):
                    (output / "int8" / place / token[0]).mkdir(parents=True)
                    (output / "int8" / place / token[0] / "half").write_text("half")

            def looks(shard: str, tensor: str, count: int) -> None:
                beside.extend(output.rglob("half"))
                on_bytes(shard, tensor, count)

            result = task(looks)
            seen.append(len([*output.glob("int8/incoming/*"), *output.glob("int8/partial/*")]))
            return result

    monkeypatch.setattr(ThisMachine, "tasks", LosesWorkers)
    convert(model, output, replace(NONE, ray="local"))
    assert seen == [0, 0, 0]
    assert beside == []
    assert tree(output) == tree(tmp_path / "one")


def _lost(job: WorkerJob, token: list[str], output: Path, shard: str) -> Any:
    token.append(_attempts(shard) + new_token())
    raise KeyboardInterrupt


def test_the_next_driver_removes_what_workers_left(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", shards=2)
    convert(model, tmp_path / "out", replace(NONE, part=(1, 2)))
    for place in ("partial", "incoming"):
        for name in (_attempts("model-00001-of-00002.safetensors") + new_token(), new_token(), "0" * 40):
            (tmp_path / "out/int8" / place / name).mkdir(parents=True)

    class Looks(CoherentProgress):
        def begin(self, *args: Any, **options: Any) -> None:
            super().begin(*args, **options)
            left.append({path.name for path in (tmp_path / "out/int8").glob("incoming/*")})

    left: list[set[str]] = []
    convert(model, tmp_path / "out", replace(NONE, ray="local"), progress=Looks())
    assert left[0] == set()  # "0" * 40 is a commit of the Hub: workers resume downloads of their own only


def test_the_driver_waits_until_it_sees_that_a_shard_was_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system of a network may show the removed shard longer than the record that it was pushed."""
    model = llama(tmp_path / "model", shards=3)
    late: dict[str, int] = {}
    finished, uploaded = RecordStore.finished, RecordStore.uploaded

    class ShownLate(Session):
        def ended(self) -> Iterator[tuple[str, Any]]:
            for name, result in super().ended():
                late[result.record.source.output] = 3
                yield name, result

    def uploaded_late(store: RecordStore, shard: ShardSource) -> UploadRecord | None:
        late[shard.output] = late.get(shard.output, 0) - 1
        return None if late[shard.output] >= 0 else uploaded(store, shard)

    def finished_still(store: RecordStore, shard: ShardSource) -> ShardRecord | None:
        return store.record(shard) if late.get(shard.output, 0) > 0 else finished(store, shard)

    monkeypatch.setattr("int8cli.conversion.late.LOOK_AGAIN_S", 0.0)
    monkeypatch.setattr(RecordStore, "uploaded", uploaded_late)
    monkeypatch.setattr(RecordStore, "finished", finished_still)
    monkeypatch.setattr(ThisMachine, "tasks", ShownLate)
    options = replace(NONE, ray="local", push_to="memory://late/model", keep_output=False)
    convert(model, tmp_path / "out", options)
    assert len(late) == 3
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_machine_without_room_stops_the_command_and_what_is_converted_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(tmp_path / "model", shards=4)
    convert(model, tmp_path / "one", NONE)
    calls: list[int] = []
    allocate = os.posix_fallocate

    def full(descriptor: int, start: int, size: int) -> None:
        calls.append(size)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(descriptor, start, size)

    options = replace(NONE, ray="local")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskSpaceError, match="not enough disk space"):
            convert(model, tmp_path / "out", options)
    records = [path.stat().st_mtime_ns for path in (tmp_path / "out/int8/records").glob("*.json")]
    assert len(records) == 2
    progress = CoherentProgress()
    convert(model, tmp_path / "out", options, progress=progress)
    assert len(progress.outcomes) == 2
    assert tree(tmp_path / "out") == tree(tmp_path / "one")
