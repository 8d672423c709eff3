"""How work in progress is reported: the one protocol, and the form that shows nothing.

Owns the words between whoever works and whoever shows it. Knows no terminal and no task by name. Needs no torch.
"""

from collections.abc import Collection, Mapping
from typing import Protocol

# The units of a task's amounts.
BYTES = "bytes"
STEPS = "steps"


class Progress(Protocol):
    """Is told how work goes. Calls may come from any thread, and from several at once.

    A task has a name, such as "convert" or "read", and parts, such as shards, blocks or files. A command may have
    several tasks under way at once. What raises an error leaves its task without a `done`.
    """

    def begin(self, task: str, parts: Mapping[str, int], *, unit: str = BYTES, finished: Collection[str] = ()) -> None:
        """A task begins, or begins anew. `parts` has the amount of each part in `unit`, and is empty where unknown.

        `finished` names the parts that an earlier run has done.
        """

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None:
        """`amount` more of a part is done; `detail` says what of it.

        An amount of 0 says that the part begins. A negative one says that some of it has to be done again.
        """

    def note(self, message: str) -> None:
        """Something the user should know that is not an error."""

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None:
        """A part is finished, or without `part` the task. `outcome` says what came of it, if that is worth a line."""


class SilentProgress:
    """Shows nothing. Also a base for whoever wants to hear of some calls only."""

    def begin(
        self, task: str, parts: Mapping[str, int], *, unit: str = BYTES, finished: Collection[str] = ()
    ) -> None: ...

    def advance(self, task: str, part: str, amount: int, detail: str = "") -> None: ...

    def note(self, message: str) -> None: ...

    def done(self, task: str, part: str | None = None, outcome: str = "") -> None: ...


SILENT = SilentProgress()
