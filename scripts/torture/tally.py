"""How a machine keeps its time and its figures."""

import time

from torture import Figures

_MOST_FOUND = 40  # lines; more of them say nothing new


class Tally:
    """The clock and the counts of one machine's run."""

    def __init__(self, machine: str, seconds: float) -> None:
        self._machine = machine
        self._began = time.monotonic()
        self._until = self._began + seconds
        self._runs = self._wrong = 0
        self._found: list[str] = []
        self._measured: dict[str, str] = {}

    @property
    def time_is_left(self) -> bool:
        return time.monotonic() < self._until

    def count(self, complaint: str = "", case: object = "") -> None:
        """One case more; with a complaint, a wrong one."""
        self._runs += 1
        if complaint:
            self._wrong += 1
            if len(self._found) < _MOST_FOUND:
                self._found.append(f"{case}: {complaint}" if case else complaint)

    def measure(self, name: str, value: object) -> None:
        self._measured[name] = str(value)

    def figures(self) -> Figures:
        took_s = time.monotonic() - self._began
        return Figures(
            self._machine, self._runs, self._wrong, took_s, tuple(self._found), tuple(self._measured.items())
        )
