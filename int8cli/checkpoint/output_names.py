"""Which names the files of an output may have, and the removal of those that an earlier run wrote.

Owns the name of our own directory in an output. A name that was read from a file is input like any other: it leads
nowhere outside, neither by itself nor through a link.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.own_files import refuse_link, remove_file
from int8cli.checkpoint.source import checked_file_name
from int8cli.errors import IndexFileError, OutputError

OWN_DIRECTORY = "int8"


def is_own(name: str) -> bool:
    """Whether a name is our directory's or lies in it, also on a disk that takes `Int8` for it."""
    return name.split("/")[0].casefold() == OWN_DIRECTORY


def is_output_name(name: str) -> bool:
    """Whether a name is that of a file inside a directory, written in the one way there is."""
    try:
        return "." not in checked_file_name(name).split("/")
    except IndexFileError:
        return False


def refuse_shared_outputs(outputs: Mapping[str, str], beside: Iterable[str] = ()) -> None:
    """Raise IndexFileError where two source files would become one output, or one would lie in our directory.

    `outputs`: source shard → output; `beside`: what is copied under its own name. Names that differ in case or in
    Unicode's form alone are one on some disks. A file where another needs a directory is in its way just so.
    """
    taken: dict[str, str] = {}
    for source, output in outputs.items():
        if is_own(output):
            raise IndexFileError(
                f"{source} would become {output}, but that directory is for files of int8cli",
                hint=f"Move the file out of {OWN_DIRECTORY}, and change the index too.",
            )
        _take(taken, source, output)
    for name in beside:
        if (other := taken.get(_as_disks_compare(name))) is not None:
            raise _one_output(other, name, name)
    for source, output in outputs.items():
        for parent in list(PurePosixPath(output).parents)[:-1]:
            if (other := taken.get(_as_disks_compare(str(parent)))) is not None:
                raise _one_output(other, source, str(parent))


def _take(taken: dict[str, str], source: str, output: str) -> None:
    other = taken.setdefault(_as_disks_compare(output), source)
    if other != source:
        raise _one_output(other, source, output)


def _one_output(first: str, second: str, output: str) -> IndexFileError:
    return IndexFileError(
        f"{first} and {second} would both be written to {output}", hint="Rename one of them, and change the index too."
    )


def remove_files(directory: Path, names: Iterable[str]) -> None:
    """Remove these files of a directory, those that are there. Raises OutputError, mostly before the first is gone.

    No link is followed on the way to a file; one in a file's place is removed itself.
    """
    wanted = list(names)
    for name in wanted:
        if not is_output_name(name):
            raise OutputError(f"{name!r} is not a file of {directory}; nothing was removed")
        _refuse_links(directory, name)
    for name in wanted:
        with disk_errors(directory / name):
            remove_file(directory / name, directory)


def _refuse_links(directory: Path, name: str) -> None:
    for parent in list(Path(name).parents)[:-1]:
        refuse_link(directory / parent)


def _as_disks_compare(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
