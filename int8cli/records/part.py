"""What the processes that share one output directory say of themselves: `int8/parts/<token>.json`.

Owns the schema of the file, who has written it, and whether that process still runs. A process holds its file locked
for as long as it lives; the locks of one machine say nothing about processes on another, and times are compared
nowhere, because the clocks of machines disagree. The files stay until the conversion is finished, so that a part with
another version of int8cli is refused even after those before it have ended.
"""

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from platform import node
from typing import Any

from int8cli.checkpoint.disk import disk_errors
from int8cli.checkpoint.lock import hold, is_held, lock_domain
from int8cli.checkpoint.own_files import create_file, opened_directory, remove_file, remove_tree, write_all
from int8cli.errors import VersionMismatchError
from int8cli.records.documents import read_document, without_schema
from int8cli.records.entries import INCOMING, PARTIAL
from int8cli.typed_json import read_as

PART_SCHEMA = "int8cli.part/1"
_ATTEMPTS = 10
_FILE = re.compile(r"[0-9a-f]{16}\.json")


@dataclass(frozen=True, slots=True)
class PartRecord:
    """One process: which part of how many it converts, where, and with which version of int8cli.

    `part` and `parts` are 0 for a process that only concludes a conversion. `host` is the machine's name, `machine`
    identifies its running kernel.
    """

    part: int
    parts: int
    host: str
    machine: str
    version: str

    @classmethod
    def here(cls, part: int, parts: int, version: str) -> "PartRecord":
        return cls(part, parts, node(), lock_domain(), version)

    @classmethod
    def from_json(cls, document: Any) -> "PartRecord":
        """Raises InvalidJsonError."""
        return read_as(cls, without_schema(document, PART_SCHEMA))


@dataclass(frozen=True, slots=True)
class KnownPart:
    """A process that has the directory, or had it. `runs` is None for one on another machine."""

    record: PartRecord
    token: str
    runs: bool | None


def new_token() -> str:
    """A name for this process that no other has."""
    return secrets.token_hex(8)


def known_parts(parts: Path) -> tuple[KnownPart, ...]:
    """Every process that has said something, by token. `parts` is the directory. Raises OutputError."""
    try:
        names = sorted(filter(_FILE.fullmatch, os.listdir(parts)))  # no other name leads to a directory of ours
    except (FileNotFoundError, NotADirectoryError):
        return ()
    found = []
    for name in names:
        record = read_document(parts / name, PartRecord.from_json, "Delete it, once no process works on the directory.")
        if record is not None:  # else it was concluded in between
            # Containers of one kernel may each have mounted the disk, with locks of its own.
            here = (record.machine, record.host) == (lock_domain(), node())
            found.append(KnownPart(record, name.removesuffix(".json"), is_held(parts / name) if here else None))
    return tuple(found)


def refuse_other_versions(parts: Path, version: str) -> None:
    """Raise VersionMismatchError if another version of int8cli has worked, or works, on a part."""
    for known in known_parts(parts):
        if known.record.version != version:
            raise VersionMismatchError(
                f"{_called(known.record)}, on {known.record.host}, has int8cli {known.record.version}; this process "
                f"has {version}",
                hint="Install one version on all machines.",
            )


@contextmanager
def joined(output: Path, parts: Path, token: str, record: PartRecord) -> Iterator[None]:
    """Say that this process works on `output`, until it ends. Processes that ended on this machine are tidied up.

    Raises VersionMismatchError, and then leaves nothing, OutputError.
    """
    path = parts / f"{token}.json"
    descriptor = _said(output, parts, token, record)
    try:
        try:
            refuse_other_versions(parts, record.version)  # of one that started at the same moment
        except VersionMismatchError:
            with disk_errors(path):
                remove_file(path, output)
            raise
        _tidy_up(output, parts, token, record)
        yield
    finally:
        os.close(descriptor)


def _said(output: Path, parts: Path, token: str, record: PartRecord) -> int:
    """Write the file of a process, locked. Returns its descriptor.

    Another process that concludes the conversion at this moment may remove the directory: then it is made again.
    """
    with disk_errors(parts / f"{token}.json"):
        for _ in range(_ATTEMPTS - 1):
            with suppress(FileNotFoundError):
                return _written(output, parts, token, record)
        return _written(output, parts, token, record)


def _written(output: Path, parts: Path, token: str, record: PartRecord) -> int:
    with opened_directory(parts, output, make=True) as directory:
        return _created(f"{token}.json", f".{token}.partial", directory, record)


def _created(name: str, aside: str, directory: int, record: PartRecord) -> int:
    descriptor = create_file(aside, directory)
    try:
        hold(descriptor)  # before it has its name, so that nobody sees it without its lock
        write_all(descriptor, (json.dumps({"schema": PART_SCHEMA, **asdict(record)}) + "\n").encode())
        os.fsync(descriptor)
        os.replace(aside, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        os.close(descriptor)
        with suppress(OSError):
            os.unlink(aside, dir_fd=directory)
        raise
    return descriptor


def _tidy_up(output: Path, parts: Path, token: str, record: PartRecord) -> None:
    """Remove the unfinished files of processes that ended here. One that did this part leaves its downloads to us."""
    own = parts.parent
    for known in known_parts(parts):
        if known.runs is not False or known.token == token:
            continue
        remove_tree(own / PARTIAL / known.token, output)
        if known.record == record:
            ours = own / INCOMING / token
            with suppress(OSError):  # it has none, or another process was quicker
                if not ours.exists():
                    (own / INCOMING / known.token).rename(ours)
            with disk_errors(parts):
                remove_file(parts / f"{known.token}.json", output)


def _called(record: PartRecord) -> str:
    return f"part {record.part} of {record.parts}" if record.parts else "a process that concludes the conversion"
