"""Where tasks run: on the machines of a Ray cluster.

Owns the connection, what the machines offer, and that all of them have the same version of int8cli.
"""

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from int8cli.errors import ClusterError, MissingRayError
from int8cli.workers.processes import OnBytes
from int8cli.workers.ray_addresses import HERE, LOCAL
from int8cli.workers.ray_session import ANSWER_WAIT_S, RaySession, TaskNeeds, Tell, first_line, other_version


class RayCluster:
    """A cluster with the same version of int8cli on all machines.

    `address` is that of a running cluster, or a word of `ray_addresses`. `needs` are set before the first task. Raises
    MissingRayError, ClusterError, VersionMismatchError.
    """

    def __init__(self, address: str, version: str) -> None:
        self._ray = _ray()
        self._version = version
        self.needs = TaskNeeds(1, 0)
        self._begun_here = not self._ray.is_initialized()
        if self._begun_here:
            self._join(address)
        try:
            self._refuse_other_versions()
        except BaseException:
            self.close()
            raise

    @property
    def cores(self) -> int:
        """Those of all machines together."""
        return int(self._ray.cluster_resources().get("CPU", 0))

    def most_cores(self, besides: TaskNeeds) -> int:
        """Those of the machine with the most, among the machines that have what a task needs besides its cores.

        0 if there is none.
        """
        able = (node for node in self._nodes() if _times(node, replace(besides, cores=0)))
        return max((int(node["Resources"].get("CPU", 0)) for node in able), default=0)

    @property
    def slots(self) -> int:
        """The most tasks that run at once, by the needs of each."""
        return max(1, sum(_times(node, self.needs) for node in self._nodes()))

    def offers(self, needs: TaskNeeds) -> bool:
        """Whether some machine could run such a task if nothing else ran there. Ray would wait for one."""
        return any(_times(node, needs) for node in self._nodes())

    @contextmanager
    def session(self, on_bytes: OnBytes, on_told: Tell = lambda item: None) -> Iterator[RaySession]:
        """Tasks with the cluster's `needs`. After an error those that still run are stopped. Raises ClusterError."""
        if not self.offers(self.needs):
            raise ClusterError(
                f"no machine of the cluster has {self.needs} for one shard",
                hint="`ray status` shows what the machines offer.",
            )
        with closing(RaySession(self._ray, self._version, self.needs, self.offers, on_bytes, on_told)) as session:
            yield session

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._begun_here:
            self._ray.shutdown()

    def _join(self, address: str) -> None:
        new = {"include_dashboard": False} if address in (LOCAL, HERE) else {}
        wanted = None if address == HERE else address  # Ray joins a cluster or starts one where it is told nothing
        try:
            with _own_handlers():
                self._ray.init(address=wanted, log_to_driver=False, logging_level=logging.ERROR, **new)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"no Ray cluster at {address!r} ({first_line(error)})",
                hint=f"`ray status` shows the cluster of this machine; {LOCAL!r} starts one here.",
            ) from error

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
                found = self._ray.get(reference, timeout=ANSWER_WAIT_S)
            except (
                self._ray.exceptions.RayError
            ):  # the machine left, or does not answer: it gets no task, or is asked then
                continue
            if found != f"int8cli {self._version}":
                raise other_version(host, found, self._version)


def _times(node: Mapping[str, Any], needs: TaskNeeds) -> int:
    """How many such tasks a machine runs at once if nothing else runs there. 1 for one that needs nothing."""
    resources = node["Resources"]
    return min((int(resources.get(name, 0) // amount) for name, amount in needs.resources.items() if amount), default=1)


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
