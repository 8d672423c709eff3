"""How often failed requests are retried, and after which pause.

Owns the count of failures of one transfer. Knows neither URLs nor files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

from int8cli.checkpoint.hub.failures import (
    TRY_AGAIN,
    asked_pause_s,
    described,
    is_foreign,
    is_transient,
    next_step,
    translated,
)
from int8cli.errors import Int8cliError, TransferError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often to fail in a row without a byte of progress before giving up, and how long to pause in between.

    The pause doubles from `first_pause_s` up to `max_pause_s`; a server's own word (Retry-After) goes before it.
    """

    attempts: int = 8
    first_pause_s: float = 1.0
    max_pause_s: float = 60.0

    def pause_s(self, failures: int) -> float:
        """The pause after so many failures in a row."""
        return min(self.max_pause_s, self.first_pause_s * 2.0 ** (failures - 1))


class TransferStoppedError(TransferError):
    """The source was closed while a transfer ran."""


class Retries:
    """Counts the failures of one transfer, named `what` in messages. Calls `on_wait(what, why, pause_s)` for each."""

    def __init__(
        self, policy: RetryPolicy, what: str, stop: Event, on_wait: Callable[[str, str, float], None] | None = None
    ) -> None:
        self.what = what
        self._policy = policy
        self._stop = stop
        self._on_wait = on_wait
        self._failures = 0

    def check_stopped(self) -> None:
        """Raise TransferStoppedError if the source has been closed."""
        if self._stop.is_set():
            raise TransferStoppedError(f"{self.what}: the download was stopped", hint=TRY_AGAIN)

    def progressed(self) -> None:
        """Reset the count, since bytes have arrived."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Pause before the next attempt; or raise, if a retry would not help or the attempts are used up."""
        if isinstance(error, Int8cliError) or not is_foreign(error):
            raise error
        if not is_transient(error):
            raise translated(error, self.what) from error
        self._failures += 1
        if self._failures >= self._policy.attempts:
            times = f"{self._failures} times in a row" if self._failures > 1 else "once"
            raise TransferError(f"{self.what}: failed {times}: {described(error)}", hint=next_step(error)) from error
        pause_s = asked_pause_s(error)
        if pause_s is None:
            pause_s = self._policy.pause_s(self._failures)
        if self._on_wait is not None:
            self._on_wait(self.what, described(error), pause_s)
        self._stop.wait(pause_s)
        self.check_stopped()

    def call(self, request: Callable[[], T]) -> T:
        """Call `request` until it succeeds, and return its result."""
        while True:
            self.check_stopped()
            try:
                return request()
            except Exception as error:  # `failed` raises every error that is not transient
                self.failed(error)
