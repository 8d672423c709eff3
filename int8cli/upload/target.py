"""The interface that a repository on the Hub and an object store share: what a conversion is pushed to.

Owns the protocol, and which places a target cannot be. The implementations are in `checkpoint`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from int8cli.checkpoint.hub.push_file import Commit, PushFile, Uploaded
from int8cli.errors import DestinationError


class Target(Protocol):
    """Takes the bytes of files one by one, and makes all of them visible at the end.

    Every method raises AccessDeniedError, DestinationError if nothing more is taken, and TransferError after retries
    that all failed.
    """

    @property
    def name(self) -> str:
        """A Hub id, or an address."""

    @property
    def revision(self) -> str:
        """The branch; empty if there are none."""

    @property
    def label(self) -> str:
        """What to call it in messages."""

    @property
    def directory(self) -> Path | None:
        """The directory of this machine that it is; None if it is elsewhere."""

    def prepare(self, ours: Sequence[str]) -> None:
        """Make it ready. Raises DestinationError for weights there that are not among the files `ours`."""

    def claim(self, conversion: PushFile) -> None:
        """Make the place that of this conversion, before a shard is uploaded. Does nothing if it is already.

        `conversion` describes it. Nobody may open what is half of one model and half of another. May be called from
        any thread or process that uploads.
        """

    def missing(self, files: Sequence[PushFile]) -> set[str]:
        """The names of files that were uploaded before and are not there any more."""

    def upload(self, file: PushFile) -> Uploaded:
        """Upload a file that is here. May be called from another thread."""

    def commit(self, files: Sequence[PushFile], message: str) -> Commit:
        """Make these files visible, all at once or in an order in which no loader finds half a model."""

    def close(self) -> None:
        """End the wait before a retry."""


def refuse_one_directory(target: Target, output: Path) -> None:
    """Raise DestinationError if a target is the directory `output` that is pushed, or one of them is in the other."""
    if target.directory is None:
        return
    there, here = Path(os.path.realpath(target.directory)), Path(os.path.realpath(output))
    if there.is_relative_to(here) or here.is_relative_to(there):
        raise DestinationError(
            f"{target.label} is {output} itself, or one of them is inside the other", hint="Choose another place."
        )
