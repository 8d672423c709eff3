"""Fetches the next file in the background while another one is used.

Owns the thread. Does not know how a file is fetched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Lock, Thread

_CLOSE_WAIT_S = 2.0


@dataclass(slots=True)
class _BackgroundFetch:
    file_name: str
    thread: Thread
    error: BaseException | None = None


class FetchAhead:
    """Fetches at most one file at a time with `fetch(file_name)`, which must end soon after `stop` is set."""

    def __init__(self, fetch: Callable[[str], object], stop: Event) -> None:
        self._fetch = fetch
        self._stop = stop
        self._current: _BackgroundFetch | None = None
        self._lock = Lock()

    def start(self, file_name: str) -> None:
        """Start to fetch a file. Does nothing while another file is being fetched."""
        with self._lock:
            if self._stop.is_set() or (self._current is not None and self._current.thread.is_alive()):
                return
            current = _BackgroundFetch(file_name, Thread(target=lambda: self._run(current), daemon=True))
            current.thread.start()  # where the system refuses it, there is none to join
            self._current = current

    def wait_for(self, file_name: str) -> None:
        """Wait for a file if it is being fetched, and raise the error of its fetch. Returns at once for other files."""
        with self._lock:
            current = self._current
            if current is None or current.file_name != file_name:
                return
            self._current = None
        current.thread.join()
        if current.error is not None:
            raise current.error

    def close(self) -> None:
        """Wait a moment for the thread to notice `stop`."""
        with self._lock:
            current = self._current
        if current is not None:
            # A stalled read may last longer; the thread is a daemon and ends with the process.
            current.thread.join(_CLOSE_WAIT_S)

    def _run(self, current: _BackgroundFetch) -> None:
        try:
            self._fetch(current.file_name)
        except BaseException as error:  # `wait_for` raises it
            current.error = error
