"""How often failed requests are retried, and after which pause.

Owns the count of failures of one transfer. Knows neither URLs nor files.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

from int8cli.checkpoint.hub.failures import (
    TRY_AGAIN,
    OutdatedRequestError,
    asked_pause_s,
    described,
    is_foreign,
    is_transient,
    next_step,
    translated,
)
from int8cli.errors import Int8cliError, TransferError

T = TypeVar("T")

# New requests about one state that are refused as outdated. With the usual pauses they take two minutes, which is
# longer than a commit of somebody else.
_MOST_OUTDATED = 8
# Failures in a row after which a pause is not made shorter than usual because the server asks for it.
_OBEYED = 3


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to go on failing without a byte of progress before giving up, and how long to pause in between.

    Until `patience_s` have passed since the first failure in a row; if that is None, `attempts` times in a row. The
    pause doubles from `first_pause_s` up to `max_pause_s`. A server may ask for another one (Retry-After): for a longer
    one always, for a shorter one in the first failures.
    """

    attempts: int = 8
    first_pause_s: float = 1.0
    max_pause_s: float = 60.0
    patience_s: float | None = None

    def pause_s(self, failures: int) -> float:
        """The pause after so many failures in a row."""
        return min(self.max_pause_s, self.first_pause_s * 2.0 ** min(failures - 1, 60))

    def gives_up(self, failures: int, failing_for_s: float) -> bool:
        """After so many failures in a row, the first of them so long ago."""
        return failures >= self.attempts if self.patience_s is None else failing_for_s >= self.patience_s


class TransferStoppedError(TransferError):
    """The source was closed while a transfer ran."""


class Retries:
    """Counts the failures of one transfer, named `what` in messages. Calls `on_wait(what, why, pause_s)` for each.

    `translate(error, what)` gives the error to raise for one that is not transient.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        what: str,
        stop: Event,
        on_wait: Callable[[str, str, float], None] | None = None,
        translate: Callable[[Exception, str], Int8cliError] = translated,
    ) -> None:
        self.what = what
        self._policy = policy
        self._stop = stop
        self._on_wait = on_wait
        self._translate = translate
        self._failures = 0
        self._failing_since_s = 0.0
        self._outdated: list[str] = []  # the states of the last refusals in a row

    def check_stopped(self) -> None:
        """Raise TransferStoppedError if the source has been closed."""
        if self._stop.is_set():
            raise TransferStoppedError(f"{self.what}: the transfer was stopped", hint=TRY_AGAIN)

    def progressed(self) -> None:
        """Reset the count, since bytes have arrived."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Pause before the next attempt; or raise, if a retry would not help or the attempts are used up."""
        if isinstance(error, Int8cliError) or not is_foreign(error):
            raise error
        if not is_transient(error) or self._stays_outdated(error):
            raise self._translate(error, self.what) from error
        if not self._failures:
            self._failing_since_s = time.monotonic()
        self._failures += 1
        failing_for_s = time.monotonic() - self._failing_since_s
        if self._policy.gives_up(self._failures, failing_for_s):
            times = f"{self._failures} times in a row" if self._failures > 1 else "once"
            over = f" in {failing_for_s / 60:,.0f} minutes" if failing_for_s >= 90 else ""
            message = f"{self.what}: failed {times}{over}: {described(error)}"
            raise TransferError(message, hint=next_step(error)) from error
        pause_s, asked_s = self._policy.pause_s(self._failures), asked_pause_s(error)
        if asked_s is not None:  # a server may ask for no pause, and fail each time
            pause_s = asked_s if self._failures <= _OBEYED else max(asked_s, pause_s)
        if self._policy.patience_s is not None:  # the last attempt is made when patience ends, not a minute before
            pause_s = min(pause_s, max(self._policy.first_pause_s, self._policy.patience_s - failing_for_s))
        if self._on_wait is not None:
            self._on_wait(self.what, described(error), pause_s)
        self._stop.wait(pause_s)
        self.check_stopped()

    def _stays_outdated(self, error: Exception) -> bool:
        """Whether a request is refused as outdated, although it is made anew and what it is about does not change."""
        if not isinstance(error, OutdatedRequestError) or error.state is None:
            self._outdated = []
            return False
        self._outdated = [*(state for state in self._outdated if state == error.state), error.state]
        return len(self._outdated) >= _MOST_OUTDATED

    def call(self, request: Callable[[], T]) -> T:
        """Call `request` until it succeeds, and return its result."""
        while True:
            self.check_stopped()
            try:
                return request()
            except Exception as error:  # `failed` raises every error that is not transient
                self.failed(error)
