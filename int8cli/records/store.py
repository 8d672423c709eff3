"""The files under `int8/` that resuming and verifying rely on, in one output directory.

Owns where they are and the order in which they are written. A shard's record is written after the shard has its final
name, so a record always describes a complete file.
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from int8cli.checkpoint.directory import is_weight_name
from int8cli.checkpoint.output_names import OWN_DIRECTORY, remove_files
from int8cli.checkpoint.own_files import refuse_link, remove_tree
from int8cli.checkpoint.writer import create_file_once, write_file
from int8cli.errors import OutputError, PlaceError, SettingsMismatchError, ShardsRemovedError
from int8cli.records.conversion import Conversion, ShardSource
from int8cli.records.documents import read_document
from int8cli.records.part import PARTS
from int8cli.records.shard_record import ShardRecord
from int8cli.records.upload_record import CommitRecord, UploadRecord

# The names of directories that belong to one process, as in `part` and in `worker_job`.
_TOKEN = re.compile(r"([0-9a-f]{16}){1,2}")


class RecordStore:
    """The records of one output directory. The caller must have locked the directory.

    `token` is that of a process which shares the directory with others: it has directories of its own for unfinished
    files and downloads, so that several may write one file at the same time.
    """

    def __init__(self, output: Path, token: str | None = None) -> None:
        self._output = output
        self._token = token
        self.own = output / OWN_DIRECTORY
        self._conversion_path = self.own / "conversion.json"
        self._records = self.own / "records"
        self._uploads = self.own / "uploads"
        self._commit_path = self.own / "push.json"
        self._sidecars = self.own / "outliers"

    @property
    def output(self) -> Path:
        """The output directory."""
        return self._output

    @property
    def partial_directory(self) -> Path:
        """Where files are written before they get their final name. What a killed run left there is useless."""
        return self._of_this_process(self.own / "partial")

    @property
    def aside(self) -> Path | None:
        """Where small files are written before they get their final name; None: beside it, for the only process."""
        return None if self._token is None else self.partial_directory

    @property
    def incoming_directory(self) -> Path:
        """Where shards from the Hub are downloaded to. A partial download that a killed run left there is resumed."""
        return self._of_this_process(self.own / "incoming")

    @property
    def calibration_directory(self) -> Path:
        """Where the results of a calibration or of a scan of the weights are saved until the conversion is finished."""
        return self.own / "calibration"

    @property
    def parts(self) -> Path:
        """Where processes that share the directory say what they do: see `parts`."""
        return self.own / PARTS

    def refuse_links(self) -> None:
        """Raise OutputError if one of our own directories is a link: its target may belong to someone else."""
        state = (*self._state, self.calibration_directory, self.partial_directory, self.incoming_directory)
        for directory in (self.own, self._records, self._uploads, self._sidecars, *state):
            refuse_link(directory)

    def remove_partial_files(self) -> None:
        """Remove unfinished files. No other process may be writing them."""
        remove_tree(self.partial_directory, self._output)

    def remove_state(self) -> None:
        """Remove everything that a later run could resume from. No other process may be using it."""
        for directory in (*self._state, self.calibration_directory):
            remove_tree(directory, self._output)

    def remove_own_partial_files(self) -> None:
        """Remove the unfinished files of this process, one of several.

        The directory above them stays, even empty: another process may be about to make its own in it.
        """
        remove_tree(self.partial_directory, self._output)

    def remove_left_over(self, beginning: str = "") -> None:
        """Remove the directories of processes whose token begins like this: of all by default.

        None of them may be running, or what it does must not be wanted any more.
        """
        for directory in (self.own / "partial", self.own / "incoming"):
            with suppress(FileNotFoundError, NotADirectoryError):
                for name in os.listdir(directory):
                    if _TOKEN.fullmatch(name) and name.startswith(beginning):
                        remove_tree(directory / name, self._output)

    @property
    def left_over(self) -> tuple[Path, ...]:
        """The directories whose files this run removes, replaces or goes on with."""
        return self.partial_directory, self.incoming_directory

    def paths_of(self, shard: ShardSource) -> list[Path]:
        """Where the files of a shard and its records are, as far as they are known. Raises OutputError."""
        record = self.record(shard)
        files = [] if record is None else [self._output / file.file for file in record.files]
        return [self._record_path(shard), self._upload_path(shard), *files]

    def conversion(self) -> Conversion | None:
        """The conversion that this directory belongs to; None if there is none. Raises OutputError."""
        hint = "Without it int8cli cannot tell which files it wrote. Choose another directory, or delete this one."
        return read_document(self._conversion_path, Conversion.from_json, hint)

    def check(self, conversion: Conversion, *, all_files: bool = True) -> None:
        """Require that the directory has no conversion, or the same one. Writes nothing.

        With `all_files` False, some of its files are not known yet: they are not compared. Raises SettingsMismatchError
        if it has another conversion, OutputError if it has files that are not ours.
        """
        known = self.conversion()
        if known is None:
            self._refuse_foreign_files(conversion)
        elif known != (conversion if all_files else replace(conversion, files=known.files)):
            raise _mismatch(self._output, known, conversion)

    def check_beside_others(self, conversion: Conversion) -> None:
        """`check`, where other processes may claim the directory and write to it at this moment."""
        try:
            self.check(conversion)
        except SettingsMismatchError:
            raise
        except OutputError:  # files without a conversion.json: another process may just have written both
            if self.conversion() is None:
                raise
            self.check(conversion)

    def claim_beside_others(self, conversion: Conversion) -> None:
        """`claim`, where other processes may do the same at this moment. Raises as `check`."""
        if self.conversion() is None:
            path = self._conversion_path
            create_file_once(path, _to_bytes(conversion.to_json()), self._output, self.partial_directory)
        self.check(conversion)

    def claim(self, conversion: Conversion) -> None:
        """Record that the directory belongs to this conversion, unless that is recorded already. Call `check` first."""
        if self.conversion() is None:
            write_file(self._conversion_path, _to_bytes(conversion.to_json()), below=self._output)

    def record(self, shard: ShardSource) -> ShardRecord | None:
        """The record of a shard; None if the shard was never finished. Raises OutputError."""
        path = self._record_path(shard)
        return read_document(path, ShardRecord.from_json, "Delete it and run again to convert its shard again.")

    def finished(self, shard: ShardSource) -> ShardRecord | None:
        """The record of a shard whose files all exist with the right size; None if it must be converted (again)."""
        record = self.record(shard)
        if record is None:
            return None
        return record if record.source == shard and self.is_here(record) else None

    def is_here(self, record: ShardRecord) -> bool:
        """Whether all files of a record exist with the right size."""
        return all(_size_of(self._output / file.file) == file.size_bytes for file in record.files)

    def uploaded(self, shard: ShardSource) -> UploadRecord | None:
        """What was uploaded of a shard, whether or not it is still here; None if nothing was, or not all of it.

        Raises OutputError if a record is damaged.
        """
        record = self.record(shard)
        hint = "Delete it and run again: what the repository has is not uploaded twice."
        upload = read_document(self._upload_path(shard), UploadRecord.from_json, hint)
        if record is None or upload is None or record.source != shard:
            return None
        sizes = {file.file: file.size_bytes for file in upload.files}
        return upload if sizes == {file.file: file.size_bytes for file in record.files} else None

    def removed(self, conversion: Conversion) -> dict[ShardSource, UploadRecord]:
        """The finished shards that were uploaded and are not here any more, with where they are."""
        found = {}
        for shard in conversion.shards:
            if self.finished(shard) is None and (upload := self.uploaded(shard)) is not None:
                found[shard] = upload
        return found

    def has_uploads(self, conversion: Conversion) -> bool:
        """Whether any shard was ever uploaded, as far as names tell. Reads no record."""
        return any(self._upload_path(shard).exists() for shard in conversion.shards)

    def refuse_removed(self, conversion: Conversion) -> None:
        """Raise ShardsRemovedError if shards were uploaded and are not here any more."""
        removed = self.removed(conversion)
        if removed:
            repositories = " and ".join(sorted({upload.repository for upload in removed.values()}))
            hint = f"Download {repositories} into another directory."
            if self.commit() is None:
                hint = "Run the same convert command again, with the repository: the push is not finished."
            raise ShardsRemovedError(
                f"{self._output}: {len(removed)} of {len(conversion.shards)} shards are not here: they were uploaded "
                f"to {repositories} and then removed",
                hint=hint,
            )

    def add_upload(self, shard: ShardSource, upload: UploadRecord) -> None:
        """Record that a repository has the files of a finished shard."""
        write_file(self._upload_path(shard), _to_bytes(upload.to_json()), below=self._output, aside=self.aside)

    def commit(self) -> CommitRecord | None:
        """The last commit that was made of this conversion; None if none was. Raises OutputError if it is damaged."""
        hint = "Delete it: the repository is asked what it has."
        return read_document(self._commit_path, CommitRecord.from_json, hint)

    def add_commit(self, commit: CommitRecord) -> None:
        """Record a commit that names all files of the conversion."""
        write_file(self._commit_path, _to_bytes(commit.to_json()), below=self._output, aside=self.aside)

    def forget_upload(self, shard: ShardSource) -> None:
        """Remove the record of an upload: the repository does not have the files."""
        remove_files(self._output, [self._upload_path(shard).relative_to(self._output).as_posix()])

    def record_files(self, conversion: Conversion) -> tuple[str, ...]:
        """The names of the conversion's own description and of its records, as files of the output directory."""
        paths = [self._conversion_path, *map(self._record_path, conversion.shards)]
        return tuple(path.relative_to(self._output).as_posix() for path in paths)

    def add(self, record: ShardRecord) -> None:
        """Record that a shard is finished. Its files must be on disk under their final names."""
        path = self._record_path(record.source)
        write_file(path, _to_bytes(record.to_json()), below=self._output, aside=self.aside)

    def clear(self) -> None:
        """Remove every file that an earlier conversion recorded as its own, and the records; nothing else.

        Raises OutputError if a recorded name leads out of the directory or is not a file name.
        """
        known = self.conversion()
        if known is None:
            return
        paths = [path(shard) for shard in known.shards for path in (self._record_path, self._upload_path)]
        records = [path.relative_to(self._output).as_posix() for path in (*paths, self._commit_path)]
        remove_files(self._output, [*known.files, *records])
        for directory in (self.partial_directory, self.parts, self.calibration_directory):
            remove_tree(directory, self._output)
        for directory in (self._records, self._uploads, self._sidecars):
            with suppress(OSError):  # it may hold other files
                directory.rmdir()
        # Last: after a kill half-way, the directory still says which files are ours.
        remove_files(self._output, [self._conversion_path.relative_to(self._output).as_posix()])

    @property
    def _state(self) -> tuple[Path, ...]:
        """The directories of all processes. What they say of themselves goes first: a process that loses its files to
        another one then finds that it is not wanted any more.
        """
        return self.parts, self.own / "partial", self.own / "incoming"

    def _of_this_process(self, directory: Path) -> Path:
        return directory if self._token is None else directory / self._token

    def _record_path(self, shard: ShardSource) -> Path:
        return self._records / _json_name(shard)

    def _upload_path(self, shard: ShardSource) -> Path:
        return self._uploads / _json_name(shard)

    def _refuse_foreign_files(self, conversion: Conversion) -> None:
        ours = [self._output / name for name in conversion.files]
        ours += [self._record_path(shard) for shard in conversion.shards] + [self.partial_directory]
        for path in ours:
            if os.path.lexists(path):
                raise PlaceError(
                    f"{path} exists and was not written by int8cli",
                    hint="Choose another directory: int8cli replaces only its own files.",
                )
        weights = sorted(filter(is_weight_name, os.listdir(self._output))) if os.path.isdir(self._output) else []
        if weights:
            raise PlaceError(
                f"{self._output} holds another model ({weights[0]})",
                hint="Choose another directory: loaders would find the weights of two models in it.",
            )


def _mismatch(output: Path, known: Conversion, requested: Conversion) -> SettingsMismatchError:
    field, before, now = known.first_difference(requested)
    return SettingsMismatchError(
        f"{output} holds a conversion with {field} {_shown(before)}; this one has {_shown(now)}",
        hint="Use the same settings to resume, start over, or choose another directory.",
    )


def _shown(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(repr, value)) or "none"
    return repr(value)


def _json_name(shard: ShardSource) -> str:
    return f"{shard.output.removesuffix('.safetensors')}.json"


def _to_bytes(data: Any) -> bytes:
    return (json.dumps(data, indent=1) + "\n").encode()


def _size_of(path: Path) -> int:
    return path.stat().st_size if os.path.isfile(path) else -1
