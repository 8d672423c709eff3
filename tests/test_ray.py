"""A conversion on a Ray cluster of several nodes on this machine, some of which are killed. `make test-ray` runs it."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.program import ROOT, llama, outcome_of, start, tree
from support.progress import CoherentProgress

from int8cli import ConvertOptions, convert
from int8cli.errors import (
    CannotRunInPartsError,
    ClusterError,
    NonFiniteError,
    OptionError,
    OutputInUseError,
    VersionMismatchError,
)
from int8cli.workers import ray_cluster

ray = pytest.importorskip("ray")
SHARDS = 12
NONE = ConvertOptions(outliers="none")
GIB = 1 << 30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ray")
    llama(root / "model", layers=6, hidden=256, intermediate=512, shards=SHARDS)
    for outliers in ("none", "weights"):
        convert(root / "model", root / outliers, ConvertOptions(outliers=outliers))
    return root


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without cores and two nodes with one each. Nodes that a test kills are replaced."""
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    os.environ["RAY_DEDUP_LOGS"] = "0"
    with chdir(tmp_path_factory.mktemp("nodes")):  # not that of the drivers, as on other machines
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20})
        for _ in range(2):
            add_node(found)
    yield found
    ray.shutdown()
    found.shutdown()


def add_node(cluster: Any, **options: Any) -> Any:
    return cluster.add_node(num_cpus=1, memory=2 * GIB, object_store_memory=80 << 20, **options)


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


def test_a_worker_that_is_killed_is_replaced(cluster: Any, root: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    killed: list[int] = []

    class KillsAWorker(CoherentProgress):
        def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
            super().done(task, part, outcome)
            for pid in workers() if len(killed) < 3 else ():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    convert(root / "model", output, on(cluster), progress=KillsAWorker())
    assert killed
    assert tree(output) == tree(root / "none")


def workers() -> list[int]:
    """The processes that run a task of ours now. Ray writes a task's name into the title of its process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::_run"):
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


def test_an_interrupted_driver_resumes(cluster: Any, root: Path, tmp_path: Path) -> None:
    class Interrupts(CoherentProgress):
        def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(root / "model", tmp_path / "out", on(cluster), progress=Interrupts())
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
    monkeypatch.setattr("int8cli.conversion.cluster._SEEN_WITHIN_S", 0.5)
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
    with pytest.raises(CannotRunInPartsError):
        convert(root / "model", tmp_path / "out", ConvertOptions(ray="auto"))
    with pytest.raises(OptionError):
        convert(root / "model", tmp_path / "out", replace(NONE, ray="auto", part=(1, 2)))


def test_reports_of_a_lost_attempt_are_taken_back() -> None:
    told: list[int] = []
    seen = ray_cluster._Seen(lambda shard, tensor, count: told.append(count))
    for attempt, total in (("a", 10), ("a", 30), ("a", 20), ("b", 5), ("b", 40)):
        seen.update("shard", attempt, "", total)
    assert told == [10, 20, -25, 35]
