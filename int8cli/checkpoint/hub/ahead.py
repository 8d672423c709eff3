"""The next file, fetched in the background while another is worked on.

Owns the thread. Knows nothing of how a file is fetched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Lock, Thread

_CLOSE_WAIT_S = 2.0


@dataclass(slots=True)
class _OnItsWay:
    file_name: str
    thread: Thread
    error: BaseException | None = None


class FetchAhead:
    """Fetches at most one file at a time; `bring(file_name)` fetches it, and `stop` ends that early."""

    def __init__(self, bring: Callable[[str], object], stop: Event) -> None:
        self._bring = bring
        self._stop = stop
        self._ahead: _OnItsWay | None = None
        self._lock = Lock()

    def start(self, file_name: str) -> None:
        """Begin to fetch a file; while one is on its way, a call for another does nothing."""
        with self._lock:
            if self._stop.is_set() or (self._ahead is not None and self._ahead.thread.is_alive()):
                return
            ahead = _OnItsWay(file_name, Thread(target=lambda: self._fetch(ahead), daemon=True))
            self._ahead = ahead
            ahead.thread.start()

    def wait_for(self, file_name: str) -> None:
        """Wait for a file that is on its way; one that is not, is not waited for. Raises what went wrong with it."""
        with self._lock:
            ahead = self._ahead
            if ahead is None or ahead.file_name != file_name:
                return
            self._ahead = None
        ahead.thread.join()
        if ahead.error is not None:
            raise ahead.error

    def close(self) -> None:
        """Wait a moment for the thread to notice `stop`."""
        with self._lock:
            ahead = self._ahead
        if ahead is not None:
            ahead.thread.join(_CLOSE_WAIT_S)  # a stalled read may last longer; the thread is a daemon and ends with us

    def _fetch(self, ahead: _OnItsWay) -> None:
        try:
            self._bring(ahead.file_name)
        except BaseException as error:  # raised again by whoever waits for this file
            ahead.error = error
