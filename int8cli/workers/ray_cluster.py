"""Where tasks run: on the machines of a Ray cluster.

Owns the connection, what is declared for a task so that Ray places it, and how progress comes back. Knows of a task
only that it takes a progress callback. Ray schedules, starts a lost task again and reports what it cannot do: nothing
of this is repeated here.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from int8cli.errors import ClusterError, Int8cliError, MissingRayError, VersionMismatchError, WorkerLostError
from int8cli.workers.processes import OnBytes, Result

LOCAL = "local"
# A task is started again so often after its worker or machine was lost.
MOST_RETRIES = 5
_POLL_S = 0.2
_VERSION_WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class TaskNeeds:
    """What one task takes of a machine."""

    cores: int
    memory_bytes: int
    gpus: int = 0


class RayCluster:
    """A cluster with the same version of int8cli on all machines.

    `address` is that of a running cluster ("auto": the one on this machine or in RAY_ADDRESS), or LOCAL for a new one
    on this machine. `needs` are set before the first task. Raises MissingRayError, ClusterError, VersionMismatchError.
    """

    def __init__(self, address: str, version: str) -> None:
        self._ray = _ray()
        self._version = version
        self.needs = TaskNeeds(1, 0)
        self._begun_here = not self._ray.is_initialized()
        if self._begun_here:
            try:
                with _own_handlers():
                    self._ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **_new(address))
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ClusterError(
                    f"no Ray cluster at {address!r} ({_first_line(error)})",
                    hint=f"`ray status` shows the cluster of this machine; {LOCAL!r} starts one here.",
                ) from error
        try:
            self._refuse_other_versions()
            self._reports = self._ray.remote(_Reports).options(num_cpus=0, max_restarts=-1).remote()
        except BaseException:
            self.close()
            raise

    @property
    def cores(self) -> int:
        """Those of all machines together."""
        return int(self._ray.cluster_resources().get("CPU", 0))

    @property
    def most_cores(self) -> int:
        """Those of the machine with the most."""
        return max((int(node["Resources"].get("CPU", 0)) for node in self._nodes()), default=0)

    def _require_room(self) -> None:
        """Raise ClusterError if no machine of the cluster could ever run a task: Ray would wait for one."""
        needs = self.needs
        wanted = {"CPU": needs.cores, "memory": needs.memory_bytes, "GPU": needs.gpus}
        for node in self._nodes():
            if all(node["Resources"].get(name, 0) >= amount for name, amount in wanted.items()):
                return
        raise ClusterError(
            f"no machine of the cluster has {needs.cores} cores, {needs.memory_bytes:,} bytes of memory and "
            f"{needs.gpus} GPUs for one shard",
            hint="`ray status` shows what the machines offer.",
        )

    def run(self, tasks: Mapping[str, Callable[[OnBytes], Result]], on_bytes: OnBytes) -> Iterator[tuple[str, Result]]:
        """Run every task and yield its name and result as it ends. Tasks of lost workers and machines run again.

        `on_bytes` gets what a task has done since its last report; a negative count takes back the work of a lost one.
        Raises the error of the first task that fails, after all others were stopped.
        """
        self._require_room()
        needs = self.needs
        resources = {"num_cpus": needs.cores, "memory": needs.memory_bytes, "num_gpus": needs.gpus}
        remote = self._ray.remote(_run).options(max_retries=MOST_RETRIES, retry_exceptions=False, **resources)
        running = {}
        seen = _Seen(on_bytes)
        try:
            for name, task in tasks.items():
                running[remote.remote(name, task, self._version, self._reports)] = name
            while running:
                ended, _ = self._ray.wait(list(running), num_returns=1, timeout=_POLL_S)
                self._pass_on(seen)
                for reference in ended:
                    yield running[reference], self._result(reference, running.pop(reference))
        finally:
            for reference in running:
                with suppress(Exception):  # the cluster may be gone
                    self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._begun_here:
            self._ray.shutdown()

    def _result(self, reference: Any, name: str) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, Int8cliError):
                raise cause from error
            raise
        except self._ray.exceptions.RayError as error:
            raise WorkerLostError(
                f"{name}: its worker was lost {MOST_RETRIES + 1} times ({_first_line(error)})",
                hint="It probably ran out of memory, or machines are leaving the cluster.",
            ) from error

    def _pass_on(self, seen: "_Seen") -> None:
        with suppress(self._ray.exceptions.RayError):  # reports are lost with their actor; it is started again
            for report in self._ray.get(self._reports.latest.remote(), timeout=_VERSION_WAIT_S):
                seen.update(*report)

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _refuse_other_versions(self) -> None:
        """Ask every machine of the cluster. A machine that joins later is asked by the first task that it gets."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        def version() -> str:  # a nested function is sent by value: a machine without int8cli can run it
            try:
                import int8cli
            except ImportError:
                return "no int8cli"
            return f"int8cli {int8cli.__version__}"

        asked = {}
        for node in self._nodes():
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[node["NodeManagerAddress"], node["NodeID"]] = (
                self._ray.remote(version).options(num_cpus=0, scheduling_strategy=here).remote()
            )
        for (host, _), reference in asked.items():
            try:
                found = self._ray.get(reference, timeout=_VERSION_WAIT_S)
            except (
                self._ray.exceptions.RayError
            ):  # the machine left, or does not answer: it gets no task, or is asked then
                continue
            if found != f"int8cli {self._version}":
                raise other_version(host, found, self._version)


def other_version(host: str, found: str, version: str) -> VersionMismatchError:
    return VersionMismatchError(
        f"the machine {host} of the cluster has {found}; this one has int8cli {version}",
        hint="Install one version on all machines.",
    )


class _Reports:
    """The actor that keeps the latest report of every task."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[str, str, str, int]] = {}

    def report(self, name: str, attempt: str, detail: str, total: int) -> None:
        self._latest[name] = (name, attempt, detail, total)

    def latest(self) -> list[tuple[str, str, str, int]]:
        found = list(self._latest.values())
        self._latest.clear()
        return found


class _Seen:
    """Turns the totals that tasks report into what is new since their last report."""

    def __init__(self, on_bytes: OnBytes) -> None:
        self._on_bytes = on_bytes
        self._totals: dict[str, tuple[str, int]] = {}

    def update(self, name: str, attempt: str, detail: str, total: int) -> None:
        before, done = self._totals.get(name, (attempt, 0))
        if before == attempt and total < done:
            return
        self._totals[name] = (attempt, total)
        self._on_bytes(name, detail, total - done)


class _Reporter:
    """Counts what a task does, and reports it to the actor a few times a second."""

    def __init__(self, name: str, attempt: str, reports: Any) -> None:
        self._send = partial(reports.report.remote, name, attempt)
        self._total, self._sent_s = 0, 0.0
        self._lock = threading.Lock()

    def __call__(self, shard: str, tensor: str, count: int) -> None:
        with self._lock:
            self._total += count
            if time.monotonic() - self._sent_s >= _POLL_S:
                self._sent_s = time.monotonic()
                self._send(tensor, self._total)


def _run(name: str, task: Callable[[OnBytes], Result], version: str, reports: Any) -> Result:
    """A task on a machine of the cluster."""
    import ray

    import int8cli
    from int8cli.workers.torch_start import start_torch

    context = ray.get_runtime_context()
    if int8cli.__version__ != version:
        raise other_version(ray.util.get_node_ip_address(), f"int8cli {int8cli.__version__}", version)
    start_torch()
    return task(_Reporter(name, context.get_worker_id(), reports))


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingRayError("a cluster needs Ray", hint="pip install 'int8cli[ray]' installs it.") from error
    return ray


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Ray takes SIGTERM over: the program's own handler comes back after this context."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main and before is not None:
            signal.signal(signal.SIGTERM, before)


def _new(address: str) -> dict[str, Any]:
    """What only a new cluster is told."""
    return {"include_dashboard": False} if address == LOCAL else {}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
