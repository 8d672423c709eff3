"""Runs the check "loads" in its own process, in parallel with all other checks.

Owns that process: its start, its answer, its end. Does not know what the check does.

Importing the loader takes seconds, the check itself almost no time. It runs in a process and not in a thread because an
import cannot be interrupted and blocks the threads that read, and because silencing the loader would silence this
program's progress too. A process also saves the second that torch needs to shut down.
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
from int8cli.errors import Int8cliError, SystemRefusalError
from int8cli.model.memory import address_space_limit
from int8cli.records.shard_record import ShardRecord
from int8cli.results.units import human_bytes
from int8cli.results.verification import Check, Failure
from int8cli.verification.loads import NAME, absent_packages, check_loads, is_imported

# The path is set first: with -c alone, a file in the working directory could stand in for a module.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; from int8cli.verification.beside import answer; answer(int(sys.argv[1]))"
)


@contextmanager
def check_loads_beside(directory: Path, layout: str, records: Sequence[ShardRecord]) -> Iterator[Callable[[], Check]]:
    """Start the check. Yields a function that waits for its result. Leaving the context ends the check.

    If the loader is not installed, the result says so. If this process has already imported the loader, the check runs
    here when the result is requested, because another process would need seconds to import it again.
    """
    absent = absent_packages(layout)
    if absent:
        are = "is" if len(absent) == 1 else "are"
        yield partial(Check.not_made, NAME, f"needs {_listed(absent)}, which {are} not installed")
    elif is_imported(layout):
        yield partial(check_loads, directory, layout, records)
    else:
        with _started() as (process, pipe):
            with suppress(OSError):  # the process has already ended: _answer_of reports how
                pipe.send((directory, layout, records))
            yield partial(_answer_of, process, pipe)


def _listed(packages: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *others, last = packages
    return f"{', '.join(others)} and {last}" if others else last


@contextmanager
def _started() -> Iterator[tuple[subprocess.Popen[bytes], Connection]]:
    """The process, and a connection to it. It is killed at the end, and leaves nothing behind."""
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
        answer: Check | str | tuple[str, str] = pipe.recv()
    except (EOFError, OSError):
        return _crashed(_end_of(process))
    if isinstance(answer, tuple):
        raise _not_possible(*answer)
    if isinstance(answer, str):
        raise RuntimeError(f"the check {NAME!r} failed in its process\n{answer}")
    return answer


def _crashed(end: str) -> Check:
    """The check where the loader's process ended in this way. Raises SystemRefusalError if that may not be the model's.

    A library that gets no memory ends its process in many ways: std::terminate, exit codes, signals.
    """
    limit_bytes = address_space_limit()
    if limit_bytes is not None:
        raise _not_possible(
            f"the loader's process ended with {end}, and may take {human_bytes(limit_bytes)} of memory (ulimit -v)",
            "Raise this limit, and run the same command again.",
        )
    why = ", which the system sends where memory runs out" if end == signal.SIGKILL.name else ""
    return Check.of(NAME, "transformers", [Failure(CONFIG_FILE, f"the loader crashed its process: {end}{why}")])


def _not_possible(message: str, hint: str) -> SystemRefusalError:
    return SystemRefusalError(f"the check {NAME!r} could not be made: {message}", hint=hint)


def _end_of(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def answer(descriptor: int) -> NoReturn:
    """The program of the process: receive a request, send the check, or an error of the system, or a traceback.

    It exits at once to free the loader's memory, because the other checks may read for hours.
    """
    gc.disable()  # collecting takes a fifth of the time, and frees 8 of 390 MB
    pipe = Connection(descriptor)
    request = pipe.recv()
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    try:
        pipe.send(check_loads(*request))
    except Int8cliError as error:  # it says nothing about the model
        pipe.send((str(error), error.hint))
    except Exception:
        pipe.send(traceback.format_exc())
    os._exit(0)


def _end_with_parent(pipe: Connection) -> None:
    connection.wait([pipe])  # returns when the other side is closed
    os._exit(1)
