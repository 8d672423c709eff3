"""What an output directory holds only until the conversion is finished.

That is files that are being written, downloads, the state of a calibration, and what processes that share the directory
say of themselves. Owns where these are, for each process, and when they are removed.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from int8cli.checkpoint.output_names import OWN_DIRECTORY
from int8cli.checkpoint.own_files import remove_tree
from int8cli.records.entries import CALIBRATION, INCOMING, PARTIAL, PARTS

# The names of directories that belong to one process, as in `part` and in `worker_job`.
_TOKEN = re.compile(r"([0-9a-f]{16}){1,2}")


class UnfinishedFiles:
    """The unfinished files in one output directory. The caller must have locked the directory.

    `token` is that of a process which shares the directory with others: it has directories of its own for files that
    are being written and for downloads, so that several may write one file at the same time.
    """

    def __init__(self, output: Path, token: str | None = None) -> None:
        self._output = output
        self._own = output / OWN_DIRECTORY
        self._token = token

    @property
    def partial_directory(self) -> Path:
        """Where files are written before they get their final name. What a killed run left there is useless."""
        return self._of_this_process(self._own / PARTIAL)

    @property
    def aside(self) -> Path | None:
        """Where small files are written before they get their final name; None: beside it, for the only process."""
        return None if self._token is None else self.partial_directory

    @property
    def incoming_directory(self) -> Path:
        """Where shards from the Hub are downloaded to. A partial download that a killed run left there is resumed."""
        return self._of_this_process(self._own / INCOMING)

    @property
    def calibration_directory(self) -> Path:
        """Where the results of a calibration or of a scan of the weights are saved until the conversion is finished."""
        return self._own / CALIBRATION

    @property
    def parts(self) -> Path:
        """Where processes that share the directory say what they do: see `part`."""
        return self._own / PARTS

    @property
    def directories(self) -> tuple[Path, ...]:
        """All of these directories, of this process and of others."""
        return (*self._of_all, self.calibration_directory, self.partial_directory, self.incoming_directory)

    @property
    def left_over(self) -> tuple[Path, ...]:
        """The directories whose files this run removes, replaces or goes on with."""
        return self.partial_directory, self.incoming_directory

    def remove_partial_files(self) -> None:
        """Remove the files that are being written: those of this process, if it shares the directory.

        The directory above that process's own stays, even empty: another one may be about to make its own in it.
        """
        remove_tree(self.partial_directory, self._output)

    def remove_left_over(self, beginning: str = "") -> None:
        """Remove the directories of processes whose token begins like this: of all by default.

        None of them may be running, or what it does must not be wanted any more.
        """
        for directory in (self._own / PARTIAL, self._own / INCOMING):
            with suppress(FileNotFoundError, NotADirectoryError):
                for name in os.listdir(directory):
                    if _TOKEN.fullmatch(name) and name.startswith(beginning):
                        remove_tree(directory / name, self._output)

    def remove_to_start_over(self) -> None:
        """Remove all but the downloads, which another conversion of the same model can use."""
        for directory in (self.partial_directory, self.parts, self.calibration_directory):
            remove_tree(directory, self._output)

    def remove_state(self) -> None:
        """Remove everything that a later run could resume from. No other process may be using it."""
        for directory in (*self._of_all, self.calibration_directory):
            remove_tree(directory, self._output)

    @property
    def _of_all(self) -> tuple[Path, ...]:
        """The directories of all processes. What they say of themselves goes first: a process that loses its files to
        another one then finds that it is not wanted any more.
        """
        return self.parts, self._own / PARTIAL, self._own / INCOMING

    def _of_this_process(self, directory: Path) -> Path:
        return directory if self._token is None else directory / self._token
