"""Where the sockets of worker processes lie: in TMPDIR, unless its path is too long for the address of a socket."""

import os
import tempfile
from multiprocessing import util

# The address of a Unix socket is a path of at most 107 bytes on Linux, and of 103 on macOS. multiprocessing adds
# "/pymp-", "/listener-" and eight characters to each, and makes a directory of its own in the one that it gets.
_LONGEST_BYTES = 103 - len("/pymp-12345678/listener-12345678")
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # nosec B108


def choose_socket_directory() -> None:
    """Have multiprocessing make its directory for sockets where their addresses fit. It makes one for a process.

    Changes nothing if TMPDIR is short enough, or if none of the short directories can be written.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_BYTES:
        return
    fitting = next((directory for directory in _SHORT if os.access(directory, os.W_OK | os.X_OK)), None)
    if fitting is None:
        return
    before = tempfile.tempdir
    tempfile.tempdir = fitting
    try:
        util.get_temp_dir()
    finally:
        tempfile.tempdir = before
