"""How work in progress is reported: the one protocol, and an implementation that shows nothing.

Owns the interface between code that works and code that shows progress. Knows no terminal and no task by name. Needs no
torch.
"""

from collections.abc import Collection, Mapping
from typing import Protocol

# The units of a task's amounts.
BYTES = "bytes"
STEPS = "steps"


class Progress(Protocol):
    """Receives progress reports. Calls may come from any thread, and from several at once.

    A task has a name, such as "convert" or "read", and parts, such as shards, blocks or files. A command may run
    several tasks at once. A task that fails never gets its `done`.
    """

    def begin(self, task: str, parts: Mapping[str, int], *, unit: str = BYTES, finished: Collection[str] = ()) -> None:
        """A task begins, or starts over. `parts` maps each part to its amount in `unit`; empty if unknown.

        `finished` names the parts that an earlier run completed.
        """

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
        """`amount` more of a part is done; `detail` names the piece, such as a tensor.

        An amount of 0 means that the part begins. A negative amount means that some of it has to be done again.
        """

    def note(self, message: str) -> None:
        """A message for the user that is not an error."""

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
        """A part is finished or, without `part`, the whole task. `outcome` is the result, if it is worth a line."""


class SilentProgress:
    """Shows nothing. Also a base class for implementations that need only some of the calls."""

    def begin(
        self, task: str, parts: Mapping[str, int], *, unit: str = BYTES, finished: Collection[str] = ()
    ) -> None: ...

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None: ...

    def note(self, message: str) -> None: ...

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None: ...


SILENT = SilentProgress()
