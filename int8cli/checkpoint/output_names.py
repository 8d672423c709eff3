"""Which names the files of an output may have, and how those of an earlier run are removed.

Owns the name of our own directory in an output. Names that were read from a file are untrusted: none may lead out of
the output, by itself or through a link.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.own_files import refuse_link, remove_file
from int8cli.checkpoint.source import checked_file_name
from int8cli.errors import IndexFileError, PlaceError

OWN_DIRECTORY = "int8"
CONVERSION_FILE = f"{OWN_DIRECTORY}/conversion.json"  # what an output is: its source, settings and files


def is_own(name: str) -> bool:
    """Whether a name is that of our directory or of a file in it, ignoring case, as some disks do."""
    return name.split("/")[0].casefold() == OWN_DIRECTORY


def is_output_name(name: str) -> bool:
    """Whether a name is that of a file inside a directory, in its only valid spelling."""
    try:
        return "." not in checked_file_name(name).split("/")
    except IndexFileError:
        return False


def refuse_shared_outputs(outputs: Mapping[str, str], beside: Iterable[str] = ()) -> None:
    """Raise IndexFileError if two source files would become one output, or one would be in our directory.

    `outputs`: source shard → output; `beside`: files that are copied under their own names. Names that differ only in
    case or Unicode form count as equal, since some disks treat them so. A file must not have the name of a directory
    that another file needs.
    """
    sources: dict[str, str] = {}
    for source, output in outputs.items():
        if is_own(output):
            raise IndexFileError(
                f"{source} would become {output}, but that directory is for files of int8cli",
                hint=f"Move the file out of {OWN_DIRECTORY}, and change the index too.",
            )
        first = sources.setdefault(_as_disks_compare(output), source)
        if first != source:
            raise _shared_output(first, source, output)
    for name in beside:
        if (other := sources.get(_as_disks_compare(name))) is not None:
            raise _shared_output(other, name, name)
    for source, output in outputs.items():
        for parent in list(PurePosixPath(output).parents)[:-1]:
            if (other := sources.get(_as_disks_compare(str(parent)))) is not None:
                raise _shared_output(other, source, str(parent))


def _shared_output(first: str, second: str, output: str) -> IndexFileError:
    return IndexFileError(
        f"{first} and {second} would both be written to {output}", hint="Rename one of them, and change the index too."
    )


def remove_files(directory: Path, names: Iterable[str]) -> None:
    """Remove these files of a directory, if they exist. All names are checked before any file is removed.

    Links are not followed: a directory that is a link raises PlaceError, and a file that is a link is removed itself.
    """
    to_remove = list(names)
    for name in to_remove:
        if not is_output_name(name):
            raise PlaceError(f"{name!r} is not a file of {directory}; nothing was removed")
        _refuse_links(directory, name)
    for name in to_remove:
        with disk_errors(directory / name):
            remove_file(directory / name, directory)


def _refuse_links(directory: Path, name: str) -> None:
    for parent in list(Path(name).parents)[:-1]:
        refuse_link(directory / parent)


def _as_disks_compare(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
