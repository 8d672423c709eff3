"""A progress that records its calls and checks that they are consistent."""

import threading
from collections.abc import Collection, Mapping

from int8cli.progress import BYTES


class CoherentProgress:
    """Asserts that tasks and parts begin before they advance, are finished once, and end complete."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: list[str] = []
        self.outcomes: dict[str, str] = {}
        self._lock = threading.Lock()
        self._parts: dict[str, dict[str, int]] = {}
        self._amounts: dict[str, dict[str, int]] = {}
        self._finished: dict[str, set[str]] = {}

    def begin(self, task: str, parts: Mapping[str, int], *, unit: str = BYTES, finished: Collection[str] = ()) -> None:
        with self._lock:
            assert set(finished) <= set(parts)
            self.tasks.append(task)
            self._parts[task], self._finished[task] = dict(parts), set(finished)
            self._amounts[task] = {part: parts[part] for part in finished}

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
        with self._lock:
            assert task in self._parts, f"{task} was not begun"
            assert not self._parts[task] or part in self._parts[task]
            assert part not in self._finished[task], f"{part} of {task} is finished"
            self._amounts[task][part] = self._amounts[task].get(part, 0) + amount

    def note(self, message: str) -> None:
        self.notes.append(message)

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
        with self._lock:
            if part is not None:
                assert part not in self._finished[task], f"{part} of {task} is finished twice"
                assert self._amounts[task].get(part, 0) == self._parts[task][part], f"{part} of {task} is not whole"
                self._finished[task].add(part)
                self.outcomes[part] = outcome
            else:
                assert self._finished[task] == set(self._parts[task]), f"{task} ends before its parts"
                del self._parts[task]

    def under_way(self) -> list[str]:
        """The tasks that were begun and not finished."""
        return sorted(self._parts)
