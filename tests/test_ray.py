"""A conversion on a Ray cluster of several nodes on this machine, some of which are killed. `make test-ray` runs it."""

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from support.calibration_models import make_model, some_text
from support.float8 import write_float8
from support.hub_uploads import WritableHub
from support.program import ROOT, Outcome, llama, outcome_of, run, start, tree, wait_until
from support.progress import CoherentProgress
from support.pushing import SOURCE, TOKEN, files_in, hub_environment, weights_here

from int8cli import ConvertOptions, __version__, convert
from int8cli.conversion.task import ShardTask
from int8cli.conversion.worker_job import TellCall, WorkerJob, WorkerResult
from int8cli.errors import (
    ClusterError,
    NonFiniteError,
    NotEnoughMemoryError,
    OptionError,
    OutputInUseError,
    VersionMismatchError,
)
from int8cli.outliers.calibrate import TASK as CALIBRATE
from int8cli.workers import ray_session
from int8cli.workers.processes import OnBytes
from int8cli.workers.ray_cluster import RayCluster
from int8cli.workers.ray_session import RaySession, TaskNeeds

ray = pytest.importorskip("ray")
SHARDS = 12
WIDE_SHARDS = 16
NONE = ConvertOptions(outliers="none")
GIB = 1 << 30
STORE_BYTES = 80 << 20
# A node that does not answer is given up after three seconds, not fifteen. One that is only slow has ten for an answer.
SOON = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ray")
    llama(root / "model", layers=6, hidden=256, intermediate=512, shards=SHARDS)
    llama(root / "wide", layers=4, hidden=512, intermediate=2048, shards=WIDE_SHARDS)  # with blocks of the full size
    for outliers in ("none", "weights"):
        convert(root / "model", root / outliers, ConvertOptions(outliers=outliers))
    return root


@pytest.fixture(scope="module")
def hub(root: Path) -> Iterator[WritableHub]:
    """A Hub that the machines of the cluster have a token for."""
    with WritableHub(root / "hub", {TOKEN: {"me"}}, part_bytes=200_000) as hub:
        hub.add_repo(SOURCE, root / "model")
        yield hub


@pytest.fixture(scope="module")
def nodes(hub: WritableHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without cores and two nodes with one each, on ports that are free. Nodes that a test kills are replaced.

    Its files are in a directory of its own, with a short path for its sockets: two such clusters, or one beside another
    cluster of this machine, do not meet.
    """
    directory = tempfile.mkdtemp(prefix="ray-")
    os.environ |= hub_environment(hub, tmp_path_factory.mktemp("hub-cache"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    os.environ |= {"RAY_DEDUP_LOGS": "0", "RAY_TMPDIR": directory}
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False, "_system_config": SOON}
    with chdir(tmp_path_factory.mktemp("nodes")):  # not that of the drivers, as on other machines
        found = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            add_node(found)
    yield found
    ray.shutdown()
    found.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def cluster(nodes: Any) -> Any:
    """The cluster, which this process has joined: the workers of one driver are used again by the next test."""
    if not ray.is_initialized():
        RayCluster(nodes.address, __version__)
    return nodes


@pytest.fixture
def apart(nodes: Any) -> Any:
    """The cluster, for a driver that joins and leaves it as a command does."""
    ray.shutdown()
    return nodes


def add_node(cluster: Any, **options: Any) -> Any:
    return cluster.add_node(num_cpus=1, memory=2 * GIB, object_store_memory=STORE_BYTES, **options)


def on(cluster: Any, options: ConvertOptions = NONE) -> ConvertOptions:
    return replace(options, ray=cluster.address)


@pytest.mark.parametrize("outliers", ["none", "weights"])
def test_a_cluster_writes_what_one_process_writes(outliers: str, cluster: Any, root: Path, tmp_path: Path) -> None:
    progress = CoherentProgress()
    result = convert(
        root / "model", tmp_path / "out", on(cluster, ConvertOptions(outliers=outliers)), progress=progress
    )
    assert progress.under_way() == []
    assert len(progress.outcomes) == SHARDS
    assert result.peak_memory_bytes is None
    assert tree(tmp_path / "out") == tree(root / outliers)


# The model is run for the columns


@pytest.fixture(scope="module")
def small(root: Path) -> Path:
    """A checkpoint that can be run, in many shards, and a text for it in `words.txt`."""
    model = make_model("llama", root / "small", max_shard_size="12KB")
    (root / "words.txt").write_text(some_text().text)
    return model


def running(root: Path, **changes: Any) -> ConvertOptions:
    """The options of a conversion that runs the model."""
    options = ConvertOptions(outliers="activations", text=root / "words.txt", tokens=48, sequence_length=16)
    return replace(options, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"outliers": "auto"},
        {"layout": "compressed-tensors"},
        {"outlier_columns": 0, "smooth": "auto"},
        {"outlier_budget": 0.02},
        {"outlier_budget": 0.02, "smooth": "auto"},
    ],
)
def test_columns_by_a_run_of_the_model(
    changes: dict[str, Any], cluster: Any, root: Path, small: Path, tmp_path: Path
) -> None:
    """One task runs the model, and shards are converted as it releases them."""
    options = running(root, **changes)
    one = convert(small, tmp_path / "one", options)
    assert one.report.settings["outliers"] == "activations"
    order: list[tuple[str, str | None]] = []

    class Order(CoherentProgress):
        def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
            super().done(task, part, outcome)
            order.append((task, part))

    progress = Order()
    convert(small, tmp_path / "out", on(cluster, options), progress=progress)
    assert progress.under_way() == []
    assert {part for task, part in order if task == CALIBRATE} == {*blocks(small), None}
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def blocks(model: Path) -> set[str]:
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    return {f"model.layers.{number}" for number in range(layers)}


def test_a_run_of_the_model_that_is_lost_resumes(
    cluster: Any, root: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = running(root, smooth="auto")
    convert(small, tmp_path / "one", options)
    killed: list[int] = []
    first_is_told = tmp_path / "killed"

    class WaitsToBeKilled(WorkerJob):
        """A local class is sent by value. It is slow once: after it has told of the first block."""

        def run_model(self, output: Path, shards: Any, recorded: Any, tell: TellCall) -> Any:
            def slowly(call: Any) -> None:
                tell(call)
                if "'done'" in repr(call):
                    wait_until(first_is_told.exists)

            return WorkerJob.run_model(self, output, shards, recorded, slowly)

    class KillsTheModel(CoherentProgress):
        def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
            super().done(task, part, outcome)
            if task == CALIBRATE and part is not None and not killed:
                killed.extend(workers("_lead"))
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
                first_is_told.touch()

    monkeypatch.setattr("int8cli.commands.on_ray.WorkerJob", WaitsToBeKilled)
    convert(small, tmp_path / "out", on(cluster, options), progress=KillsTheModel())
    assert len(killed) == 1
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_a_driver_that_is_interrupted_while_the_model_runs_resumes(
    cluster: Any, root: Path, small: Path, tmp_path: Path
) -> None:
    options = running(root, smooth="auto")
    convert(small, tmp_path / "one", options)

    class Interrupts(CoherentProgress):
        def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
            if part == "model.layers.1":  # the first one is saved by then
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(small, tmp_path / "out", on(cluster, options), progress=Interrupts())
    progress = CoherentProgress()
    convert(small, tmp_path / "out", on(cluster, options), progress=progress)
    assert any("blocks already run" in note for note in progress.notes)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_a_model_that_cannot_be_run_falls_back(cluster: Any, root: Path, tmp_path: Path) -> None:
    """It has no tokenizer; `auto` then chooses by the weights, as on one machine."""
    convert(root / "model", tmp_path / "out", on(cluster, ConvertOptions()))
    assert tree(tmp_path / "out") == tree(root / "weights")


def test_a_cluster_without_room_for_a_block_falls_back(
    cluster: Any, root: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("int8cli.commands.on_ray.memory_to_run", lambda *_: 1 << 50)
    with pytest.raises(NotEnoughMemoryError, match=r"no machine of the cluster has 1 cores, .* for a run of the model"):
        convert(small, tmp_path / "out", on(cluster, running(root)))
    convert(small, tmp_path / "out", on(cluster, running(root, outliers="auto")))
    convert(small, tmp_path / "one", ConvertOptions(outliers="weights"))
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


# From the Hub and to it


class Driver:
    """The program on a machine that has joined the cluster."""

    def __init__(self, cluster: Any, hub: WritableHub, home: Path) -> None:
        self._cluster, self._hub, self.home = cluster, hub, home

    def __call__(self, *args: str) -> Outcome:
        return outcome_of(self.start(*args))

    def start(self, *args: str) -> "Popen[str]":
        return start(*self.command(*args), cwd=self.home, env=hub_environment(self._hub, self.home / "hf"))

    def command(self, *args: str) -> tuple[str, ...]:
        return ("convert", SOURCE, "-o", "out", "--outliers", "none", "--ray", self._cluster.address, *args)


@pytest.fixture
def driver(cluster: Any, hub: WritableHub, tmp_path: Path) -> Iterator[Driver]:
    yield Driver(cluster, hub, tmp_path)
    hub.watch = lambda step, when: False
    hub.commits.clear()
    hub.put_objects.clear()


@pytest.fixture(scope="module")
def from_hub(hub: WritableHub, root: Path) -> Path:
    """What one process makes of the model on the Hub."""
    (root / "one").mkdir()
    env = hub_environment(hub, root / "one/hf")
    outcome = run("convert", SOURCE, "-o", "out", "--outliers", "none", "-q", cwd=root / "one", env=env)
    assert outcome.code == 0, outcome.err
    return root / "one/out"


def test_the_workers_read_the_hub(driver: Driver, from_hub: Path) -> None:
    outcome = driver("-q")
    assert outcome.code == 0, outcome.err
    assert tree(driver.home / "out") == tree(from_hub)


def test_the_workers_upload_and_the_driver_commits(driver: Driver, hub: WritableHub, from_hub: Path) -> None:
    outcome = driver("--push-to-hub", "me/one", "--no-keep-output")
    assert outcome.code == 0, outcome.err
    assert hub.files_of("me/one") == files_in(from_hub)
    assert len(hub.commits) == 1
    assert set(hub.put_objects.values()) == {1}
    assert weights_here(driver.home / "out") == []
    assert "pushed to me/one: " in outcome.err
    assert TOKEN not in outcome.out + outcome.err


def test_workers_that_are_killed_while_they_upload(driver: Driver, hub: WritableHub, from_hub: Path) -> None:
    killed: list[int] = []

    def kill(step: str, when: str) -> bool:
        for pid in workers() if step in ("complete", "verify") and len(killed) < 3 else ():
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return False

    hub.watch = kill
    outcome = driver("--push-to-hub", "me/two", "--no-keep-output", "-q")
    assert outcome.code == 0, outcome.err
    assert killed
    assert hub.files_of("me/two") == files_in(from_hub)
    assert (len(hub.commits), set(hub.put_objects.values())) == (1, {1})
    assert weights_here(driver.home / "out") == []


def test_a_killed_driver_uploads_nothing_twice(driver: Driver, hub: WritableHub, from_hub: Path) -> None:
    command = ("--push-to-hub", "me/three", "--no-keep-output", "-q")
    process = driver.start(*command)
    uploads = driver.home / "out/int8/uploads"
    wait_until(lambda: len(list(uploads.glob("[!.]*.json"))) > 1 or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    outcome_of(process)
    assert hub.commits == []
    outcome = driver(*command)
    assert outcome.code == 0, outcome.err
    assert hub.files_of("me/three") == files_in(from_hub)
    assert (len(hub.commits), set(hub.put_objects.values())) == (1, {1})


def test_a_token_that_expires_on_the_machines_is_an_error(driver: Driver, hub: WritableHub, from_hub: Path) -> None:
    def expire(step: str, when: str) -> bool:
        if step == "complete":
            hub.tokens.pop(TOKEN, None)
        return False

    hub.watch = expire
    command = ("--push-to-hub", "me/four", "--no-keep-output", "-q")
    outcome = driver(*command)
    hub.tokens[TOKEN] = {"me"}
    hub.watch = lambda step, when: False
    assert (outcome.code, "401 Unauthorized" in outcome.err) == (1, True), outcome.err
    assert driver(*command).code == 0
    assert hub.files_of("me/four") == files_in(from_hub)
    assert (len(hub.commits), set(hub.put_objects.values())) == (1, {1})


# The address


def test_without_an_address_the_cluster_of_this_machine_is_joined(cluster: Any, root: Path, tmp_path: Path) -> None:
    command = ("convert", root / "model", "-o", "out", "--outliers", "none", "-q", "--ray")
    outcome = run(*command, cwd=tmp_path, env={"RAY_ADDRESS": cluster.address})
    assert outcome.code == 0, outcome.err
    assert tree(tmp_path / "out") == tree(root / "none")


def test_without_a_cluster_one_is_started(
    apart: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray does both where it is told no address; what it does is not repeated here."""
    given: list[Any] = []
    init = ray.init

    def join(**options: Any) -> None:
        given.append((options.pop("address"), options.pop("include_dashboard")))
        init(address=apart.address, **options)

    monkeypatch.setattr(ray, "init", join)
    for address in ("here", "local"):
        convert(root / "model", tmp_path / address, replace(NONE, ray=address))
        assert tree(tmp_path / address) == tree(root / "none")
    assert given == [(None, False), ("local", False)]


# Bad days


@pytest.mark.parametrize(("outliers", "threads"), [("none", 1), ("weights", 1), ("none", 4)])
def test_a_worker_takes_no_more_memory_than_is_declared(
    outliers: str, threads: int, nodes: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor more with every shard: malloc would keep a buffer for each of a worker's many threads."""
    own_workers(nodes)  # those of other tests may have run a model
    node = nodes.add_node(num_cpus=threads, memory=2 * GIB, object_store_memory=STORE_BYTES) if threads > 1 else None
    declared: list[TaskNeeds] = []
    started = RaySession.start

    def start(session: RaySession, name: str, task: Any) -> None:
        declared.append(session._needs)
        started(session, name, task)

    def measured(name: str, task: Any, version: str, reports: Any) -> Any:  # sent by value, as it is no module's
        from int8cli.workers.ray_session import _run

        result = _run(name, task, version, reports)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        sizes = [int(status[name].split()[0]) * 1024 for name in ("VmHWM", "RssFile")]
        with (tmp_path / f"{os.getpid()}-{task.func.__name__}.peaks").open("a") as peaks:
            peaks.write(json.dumps(sizes) + "\n")
        return result

    monkeypatch.setattr(RaySession, "start", start)
    monkeypatch.setattr(ray_session, "_run", measured)
    convert(root / "wide", tmp_path / "out", on(nodes, ConvertOptions(outliers=outliers, threads=threads)))
    if node is not None:
        nodes.remove_node(node)
    workers = {path.name: read_peaks(path) for path in tmp_path.glob("*.peaks")}
    assert max(map(max, workers.values())) <= declared[0].memory_bytes
    converted = [peaks for name, peaks in workers.items() if "convert" in name]
    assert sum(map(len, converted)) >= WIDE_SHARDS
    for peaks in converted:
        assert peaks[-1] - peaks[len(peaks) // 2] < 4_000_000


def read_peaks(path: Path) -> list[int]:
    """The peaks of a worker, with as much of its libraries' files in memory as is usual.

    How much of these counts for a process is the system's choice, and machines free it where memory is short.
    """
    usual_bytes = 120_000_000
    sizes = [json.loads(line) for line in path.read_text().splitlines()]
    return [peak - file_bytes + min(usual_bytes, file_bytes) for peak, file_bytes in sizes]


def own_workers(cluster: Any) -> None:
    """Join the cluster as a new driver, which gets workers of its own."""
    ray.shutdown()
    RayCluster(cluster.address, __version__)


def test_scales_in_another_shard_are_read_by_the_workers(cluster: Any, tmp_path: Path) -> None:
    llama(tmp_path / "source", shards=1)
    write_float8(tmp_path / "source", tmp_path / "model", apart=True)
    convert(tmp_path / "model", tmp_path / "one", NONE)
    convert(tmp_path / "model", tmp_path / "out", on(cluster))
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_a_node_that_is_killed_costs_its_shards_only(cluster: Any, root: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    extra = add_node(cluster)
    killed: list[str | None] = []

    class KillsANode(CoherentProgress):
        def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
            super().done(task, part, outcome)
            if not killed:
                killed.append(part)
                cluster.remove_node(extra, allow_graceful=False)

    progress = KillsANode()
    convert(root / "model", output, on(cluster), progress=progress)
    assert killed
    assert len(progress.outcomes) == SHARDS
    assert tree(output) == tree(root / "none")


def test_a_worker_that_is_killed_is_replaced(
    cluster: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, begun = tmp_path / "out", tmp_path / "begun"
    killed: list[int] = []

    class WaitsToBeKilled(WorkerJob):
        """A local class is sent by value. Its second shard is not finished by the first attempt."""

        def convert(self, task: ShardTask, on_bytes: OnBytes) -> WorkerResult:
            if task.source.output.startswith("model-00002-") and not begun.exists():
                begun.touch()
                signal.pause()
            return WorkerJob.convert(self, task, on_bytes)

    class KillsWorkers(CoherentProgress):
        def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
            super().done(task, part, outcome)
            if not killed:
                wait_until(begun.exists)
                killed.extend(workers())
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr("int8cli.commands.on_ray.WorkerJob", WaitsToBeKilled)
    convert(root / "model", output, on(cluster), progress=KillsWorkers())
    assert killed
    assert tree(output) == tree(root / "none")


def workers(task: str = "_run") -> list[int]:
    """The processes that run a task of ours now. Ray writes a task's name into the title of its process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(f"ray::{task}".encode()):
                found.append(int(entry.name))
    return found


def test_a_killed_driver_resumes(cluster: Any, root: Path, tmp_path: Path) -> None:
    arguments = ("convert", root / "model", "-o", "out", "--outliers", "none", "--ray", cluster.address)
    process = start(*arguments, cwd=tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[1/"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    outcome_of(process)
    recorded = list((tmp_path / "out/int8/records").glob("[!.]*.json"))
    assert recorded
    progress = CoherentProgress()
    convert(root / "model", tmp_path / "out", on(cluster), progress=progress)
    assert len(progress.outcomes) <= SHARDS - len(recorded)
    assert tree(tmp_path / "out") == tree(root / "none")


def test_an_interrupted_driver_resumes(apart: Any, root: Path, tmp_path: Path) -> None:
    class Interrupts(CoherentProgress):
        def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(root / "model", tmp_path / "out", on(apart), progress=Interrupts())
    assert not ray.is_initialized()
    convert(root / "model", tmp_path / "out", NONE)  # on this machine alone
    assert tree(tmp_path / "out") == tree(root / "none")


def test_two_drivers_on_one_output(cluster: Any, root: Path, tmp_path: Path) -> None:
    refused: list[bool] = []

    class StartsAnother(CoherentProgress):
        def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
            super().done(task, part, outcome)
            if not refused:
                refused.append(True)
                with pytest.raises(OutputInUseError):
                    convert(root / "model", tmp_path / "out", on(cluster))

    convert(root / "model", tmp_path / "out", on(cluster), progress=StartsAnother())
    assert refused
    assert tree(tmp_path / "out") == tree(root / "none")


def test_another_version_on_a_node_is_refused_with_both(cluster: Any, root: Path, tmp_path: Path) -> None:
    startup = tmp_path / "startup"
    startup.mkdir()
    (startup / "sitecustomize.py").write_text('import int8cli\nint8cli.__version__ = "9.9.9"\n')
    node = add_node(cluster, env_vars={"PYTHONPATH": os.pathsep.join([str(startup), os.environ["PYTHONPATH"]])})
    try:
        with pytest.raises(VersionMismatchError, match=r"has int8cli 9\.9\.9; this one has int8cli 0"):
            convert(root / "model", tmp_path / "out", on(cluster))
    finally:
        cluster.remove_node(node, allow_graceful=False)
    assert not (tmp_path / "out/config.json").exists()


def test_an_error_of_a_worker_is_that_of_the_command(cluster: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = llama(tmp_path / "model", shards=1)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="up_proj") as caught:
        convert(model, tmp_path / "out", on(cluster))
    assert caught.value.hint or str(caught.value)


def test_workers_that_see_another_directory_are_an_error(
    cluster: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path means another directory to a worker that was started elsewhere."""
    monkeypatch.setattr("int8cli.conversion.cluster._anywhere", lambda task: task)
    monkeypatch.setattr("int8cli.conversion.late.LATE_S", 0.5)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClusterError, match=r"a worker has written .* but it is not in out"):
        convert(root / "model", "out", on(cluster))
    assert not (tmp_path / "out/config.json").exists()


def test_what_no_machine_offers_is_refused(cluster: Any, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"no machine of the cluster has 1 cores, .* 1 GPUs"):
        convert(root / "model", tmp_path / "out", on(cluster, replace(NONE, device="cuda")))


def test_a_cluster_that_is_not_there_is_an_error(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    ray.shutdown()
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ClusterError, match=r"no Ray cluster at 'auto' \(Could not find any running Ray"):
        convert(root / "model", tmp_path / "out", replace(NONE, ray="auto"))


def test_options_that_a_cluster_has_not(root: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        convert(root / "model", tmp_path / "out", replace(NONE, ray="auto", part=(1, 2)))


def test_reports_of_a_lost_attempt_are_taken_back() -> None:
    told: list[int] = []
    seen = ray_session._Seen(lambda shard, tensor, count: told.append(count))
    for attempt, total in (("a", 10), ("a", 30), ("a", 20), ("b", 5), ("b", 40)):
        seen.update("shard", attempt, "", total)
    assert told == [10, 20, -25, 35]
