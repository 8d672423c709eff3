"""Tasks on the machines of a Ray cluster, and what they report while they run.

Owns what is declared for a task so that Ray places it, and how reports come back. Knows of a task only what it is
called with. Ray schedules, starts a lost task again and reports what it cannot do: nothing of this is repeated here.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from int8cli.errors import ClusterError, Int8cliError, VersionMismatchError
from int8cli.workers.processes import OnBytes, Result

# A task is started again so often after its worker or machine was lost.
MOST_RETRIES = 5
ANSWER_WAIT_S = 120.0
_POLL_S = 0.2
# How often the machines are asked for, and how long they may lack what a task needs: others may join meanwhile.
_MACHINES_S, _MACHINES_WAIT_S = 30.0, 600.0
_END_WAIT_S = 10.0
# Says something to who started a task: a picklable object.
Tell = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class TaskNeeds:
    """What one task takes of a machine."""

    cores: int
    memory_bytes: int
    gpus: int = 0

    @property
    def resources(self) -> dict[str, float]:
        """By Ray's names."""
        return {"CPU": self.cores, "memory": self.memory_bytes, "GPU": self.gpus}

    def __str__(self) -> str:
        return f"{self.cores} cores, {self.memory_bytes:,} bytes of memory and {self.gpus} GPUs"


Offers = Callable[[TaskNeeds], bool]


class RaySession:
    """Tasks that run at the same time. Make it with `RayCluster.session`.

    `offers` says whether some machine of the cluster could run a task with such needs. `on_bytes` gets what a task has
    done since its last report; a negative count takes back the work of a lost one. `on_told` gets what a leading task
    says.
    """

    def __init__(
        self, ray: Any, version: str, needs: TaskNeeds, offers: Offers, on_bytes: OnBytes, on_told: Tell
    ) -> None:
        self._machines = _Machines(offers)
        self._ray, self._version, self._needs, self._on_told = ray, version, needs, on_told
        self._seen = _Seen(on_bytes)
        self._running: dict[Any, tuple[str, TaskNeeds]] = {}
        self._reports = ray.remote(_Reports).options(num_cpus=0, max_restarts=-1).remote()

    def start(self, name: str, task: Callable[[OnBytes], Any]) -> None:
        """Start a task, once a machine has what it needs. If its worker or machine is lost, it runs again."""
        self._start(_run, self._needs, name, task)

    def lead(self, name: str, task: Callable[[Tell], Any], needs: TaskNeeds) -> None:
        """Start a task with needs of its own, which tells what it finds while it runs.

        What is told by one that is lost may be lost too, or come again from the one that is started instead.
        """
        self._start(_lead, needs, name, task)

    def ended(self) -> Iterator[tuple[str, Any]]:
        """Name and result of every task as it ends, also of those that are started meanwhile.

        Raises the error of the first task that fails; ClusterError if the machines that could run one have left.
        """
        while self._running:
            ended, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_POLL_S)
            self._pass_on()
            for reference in ended:
                name, _ = self._running.pop(reference)
                yield name, self._result(reference, name)
            self._machines.check({needs for _, needs in self._running.values()})

    def close(self) -> None:
        """Stop the tasks that still run, and wait until they have ended."""
        if not self._running:
            return
        with suppress(Exception):  # the cluster may be gone
            for reference in self._running:
                self._ray.cancel(reference, force=True)
            self._ray.wait(list(self._running), num_returns=len(self._running), timeout=_END_WAIT_S)

    def _start(self, function: Callable[..., Any], needs: TaskNeeds, name: str, task: Callable[..., Any]) -> None:
        declared = {"num_cpus": needs.cores, "memory": needs.memory_bytes, "num_gpus": needs.gpus}
        remote = self._ray.remote(function).options(max_retries=MOST_RETRIES, retry_exceptions=False, **declared)
        self._running[remote.remote(name, task, self._version, self._reports)] = name, needs

    def _result(self, reference: Any, name: str) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, Int8cliError):
                raise cause from error
            raise
        except self._ray.exceptions.RayError as error:
            raise ClusterError(
                f"{name}: its worker was lost {MOST_RETRIES + 1} times ({first_line(error)})",
                hint="It probably ran out of memory, or machines are leaving the cluster.",
            ) from error

    def _pass_on(self) -> None:
        try:
            totals, told = self._ray.get(self._reports.latest.remote(), timeout=ANSWER_WAIT_S)
        except self._ray.exceptions.RayError:  # reports are lost with their actor; it is started again
            return
        for report in totals:
            self._seen.update(*report)
        for item in told:
            self._on_told(item)


class _Machines:
    """Whether the cluster still has machines that could run each task: Ray would wait for one for ever."""

    def __init__(self, offers: Offers) -> None:
        self._offers = offers
        self._asked_s = time.monotonic()
        self._lacking_since_s: dict[TaskNeeds, float] = {}

    def check(self, wanted: set[TaskNeeds]) -> None:
        """Raises ClusterError once no machine has offered what a task needs for `_MACHINES_WAIT_S`."""
        now_s = time.monotonic()
        if now_s - self._asked_s < _MACHINES_S:
            return
        self._asked_s = now_s
        lacking = {needs for needs in wanted if not self._offers(needs)}
        self._lacking_since_s = {needs: self._lacking_since_s.get(needs, now_s) for needs in lacking}
        for needs, since_s in self._lacking_since_s.items():
            if now_s - since_s >= _MACHINES_WAIT_S:
                raise ClusterError(
                    f"no machine of the cluster has {needs} any more",
                    hint="Run the same command again: it resumes with the machines that are there.",
                )


class _Reports:
    """The actor that keeps the latest total of every task, and all that was told."""

    def __init__(self) -> None:
        self._totals: dict[str, tuple[str, str, str, int]] = {}
        self._told: list[Any] = []

    def report(self, name: str, attempt: str, detail: str, total: int) -> None:
        self._totals[name] = (name, attempt, detail, total)

    def tell(self, item: Any) -> None:
        self._told.append(item)

    def latest(self) -> tuple[list[tuple[str, str, str, int]], list[Any]]:
        """What has come since the last call."""
        found = list(self._totals.values()), self._told
        self._totals, self._told = {}, []
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
    _begin(version)
    import ray

    return task(_Reporter(name, ray.get_runtime_context().get_worker_id(), reports))


def _lead(name: str, task: Callable[[Tell], Result], version: str, reports: Any) -> Result:
    """A leading task. Ends once all that it has told has arrived."""
    _begin(version)
    import ray

    arrived: list[Any] = []

    def tell(item: Any) -> None:
        arrived[:] = [reports.tell.remote(item)]

    result = task(tell)
    with suppress(ray.exceptions.RayError):  # it is told in vain where the actor is lost
        ray.get(arrived, timeout=ANSWER_WAIT_S)
    return result


def _begin(version: str) -> None:
    """Raises VersionMismatchError on a machine that has joined with another version."""
    import ray

    import int8cli
    from int8cli.workers.torch_start import start_torch

    if int8cli.__version__ != version:
        raise other_version(ray.util.get_node_ip_address(), f"int8cli {int8cli.__version__}", version)
    start_torch()


def other_version(host: str, found: str, version: str) -> VersionMismatchError:
    return VersionMismatchError(
        f"the machine {host} of the cluster has {found}; this one has int8cli {version}",
        hint="Install one version on all machines.",
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
