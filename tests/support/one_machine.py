"""A cluster of one process, in place of Ray: a worker opens source and output itself, as on another machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from int8cli.workers.processes import OnBytes

Tell = Callable[[Any], None]


class Session:
    """Runs each task when its result is wanted."""

    def __init__(self, on_bytes: OnBytes, on_told: Tell) -> None:
        self._on_bytes, self._on_told = on_bytes, on_told
        self._tasks: list[tuple[str, Callable[[], Any]]] = []

    def start(self, name: str, task: Callable[[OnBytes], Any]) -> None:
        self._tasks.append((name, lambda: task(self._on_bytes)))

    def lead(self, name: str, task: Callable[[Tell], Any], needs: object) -> None:
        self._tasks.append((name, lambda: task(self._on_told)))

    def ended(self) -> Iterator[tuple[str, Any]]:
        while self._tasks:
            name, task = self._tasks.pop(0)
            yield name, task()


class ThisMachine:
    """Takes the place of RayCluster."""

    cores = slots = 1
    tasks = Session

    def __init__(self, address: str, version: str) -> None:
        self.needs: Any = None

    def most_cores(self, besides: object) -> int:
        return 1

    def offers(self, needs: object) -> bool:
        return True

    @contextmanager
    def session(self, on_bytes: OnBytes, on_told: Tell = lambda item: None) -> Iterator[Any]:
        yield type(self).tasks(on_bytes, on_told)

    def close(self) -> None:
        pass
