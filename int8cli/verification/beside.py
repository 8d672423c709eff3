"""The check "loads" in a process of its own, beside all other checks.

Owns that process: its start, its answer, its end. Knows nothing of what the check does.

To import the loader takes seconds, the check itself hardly any time. A process rather than a thread: an import cannot
be interrupted, it holds the interpreter's lock against the threads that read, and what silences the loader would
silence this program's progress too. It also saves the second that torch takes to shut down.
"""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from int8cli.checkpoint.config_file import CONFIG_FILE
from int8cli.records.shard_record import ShardRecord
from int8cli.results.verification import Check, Failure
from int8cli.verification.loads import NAME, absent_packages, check_loads, is_imported

# The path is set first: with -c alone, a file in the working directory could stand in for a module.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; from int8cli.verification.beside import answer; answer(int(sys.argv[1]))"
)


@contextmanager
def check_loads_beside(directory: Path, layout: str, records: Sequence[ShardRecord]) -> Iterator[Callable[[], Check]]:
    """Begin the check. Yields what waits for its result; leaving the context ends it, done or not.

    Where the loader is not installed, that is the result. Where it is imported already, the check is made here, when
    the result is asked for: a process would spend seconds on importing it again.
    """
    absent = absent_packages(layout)
    if absent:
        yield partial(Check.not_made, NAME, f"needs {' and '.join(absent)}, which is not installed")
    elif is_imported(layout):
        yield partial(check_loads, directory, layout, records)
    else:
        with _started() as (process, pipe):
            with suppress(OSError):  # it has ended already: the call for its answer reports how
                pipe.send((directory, layout, records))
            yield partial(_answer_of, process, pipe)


@contextmanager
def _started() -> Iterator[tuple[subprocess.Popen[bytes], Connection]]:
    """The process, and a connection to it. It is killed at the end; it leaves nothing behind."""
    ours, theirs = multiprocessing.Pipe()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        try:
            yield process, ours
        finally:
            process.kill()
            process.wait()


def _answer_of(process: subprocess.Popen[bytes], pipe: Connection) -> Check:
    try:
        answer: Check | str = pipe.recv()
    except (EOFError, OSError):
        return Check.of(
            NAME, "transformers", [Failure(CONFIG_FILE, f"the loader crashed its process: {_end_of(process)}")]
        )
    if isinstance(answer, str):
        raise RuntimeError(f"the check {NAME!r} failed in its process\n{answer}")
    return answer


def _end_of(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def answer(descriptor: int) -> NoReturn:
    """What the process does: take a request, send the check, or the traceback of an error, and end.

    The memory of the loader is freed at once: hours of reading may follow.
    """
    gc.disable()  # it looks again and again at all that was imported: a fifth of the time, for 8 MB of 390
    pipe = Connection(descriptor)
    request = pipe.recv()
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    try:
        pipe.send(check_loads(*request))
    except Exception:
        pipe.send(traceback.format_exc())
    os._exit(0)


def _end_with_parent(pipe: Connection) -> None:
    connection.wait([pipe])  # it returns when the other side has closed
    os._exit(1)
