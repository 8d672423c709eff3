"""The files under `int8/` that resuming and verifying rely on, in one output directory.

Owns where they are and the order in which they are written. A shard's record is written after the shard has its final
name, so a record always describes a complete file.
"""

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from int8cli.checkpoint.directory import is_weight_name
from int8cli.checkpoint.output_names import CONVERSION_FILE, OWN_DIRECTORY, remove_files
from int8cli.checkpoint.own_files import refuse_link
from int8cli.checkpoint.writer import create_file_once, write_file
from int8cli.errors import OutputError, PlaceError, SettingsMismatchError, ShardsRemovedError
from int8cli.records.conversion import Conversion, ShardSource
from int8cli.records.documents import read_document
from int8cli.records.entries import COMMIT, CONVERSION, RECORDS, UPLOADS
from int8cli.records.shard_record import ShardRecord
from int8cli.records.unfinished import UnfinishedFiles
from int8cli.records.upload_record import CommitRecord, UploadRecord


class RecordStore:
    """The records of one output directory. The caller must have locked the directory.

    `token` is that of a process which shares the directory with others. `unfinished` are its files beside the records.
    """

    def __init__(self, output: Path, token: str | None = None) -> None:
        self._output = output
        self.own = output / OWN_DIRECTORY
        self.unfinished = UnfinishedFiles(output, token)
        self._conversion_path = self.own / CONVERSION
        self._records = self.own / RECORDS
        self._uploads = self.own / UPLOADS
        self._commit_path = self.own / COMMIT
        self._sidecars = self.own / "outliers"

    @property
    def output(self) -> Path:
        """The output directory."""
        return self._output

    def refuse_links(self) -> None:
        """Raise OutputError if one of our own directories is a link: its target may belong to someone else."""
        unfinished = self.unfinished.directories
        for directory in (self.own, self._records, self._uploads, self._sidecars, *unfinished):
            refuse_link(directory)

    def paths_of(self, shard: ShardSource) -> list[Path]:
        """Where the files of a shard and its records are, as far as they are known. Raises OutputError."""
        record = self.record(shard)
        files = [] if record is None else [self._output / file.file for file in record.files]
        return [self._record_path(shard), self._upload_path(shard), *files]

    def conversion(self) -> Conversion | None:
        """The conversion that this directory belongs to; None if there is none. Raises OutputError."""
        hint = "Without it int8cli cannot tell which files it wrote. Choose another directory, or delete this one."
        return read_document(self._conversion_path, Conversion.from_json, hint)

    def require_conversion(self) -> Conversion:
        """The same. Raises OutputError if there is none."""
        conversion = self.conversion()
        if conversion is None:
            raise OutputError(
                f"{self._output} is not a conversion: it has no {CONVERSION_FILE}",
                hint="DIR is a directory that `int8cli convert` writes.",
            )
        return conversion

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
            create_file_once(path, _to_bytes(conversion.to_json()), self._output, self.unfinished.partial_directory)
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
        self._write(self._upload_path(shard), upload.to_json())

    def commit(self) -> CommitRecord | None:
        """The last commit that was made of this conversion; None if none was. Raises OutputError if it is damaged."""
        hint = "Delete it: the repository is asked what it has."
        return read_document(self._commit_path, CommitRecord.from_json, hint)

    def add_commit(self, commit: CommitRecord) -> None:
        """Record a commit that names all files of the conversion."""
        self._write(self._commit_path, commit.to_json())

    def forget_upload(self, shard: ShardSource) -> None:
        """Remove the record of an upload: the repository does not have the files."""
        remove_files(self._output, [self._upload_path(shard).relative_to(self._output).as_posix()])

    def record_files(self, conversion: Conversion) -> tuple[str, ...]:
        """The names of the conversion's own description and of its records, as files of the output directory."""
        paths = [self._conversion_path, *map(self._record_path, conversion.shards)]
        return tuple(path.relative_to(self._output).as_posix() for path in paths)

    def add(self, record: ShardRecord) -> None:
        """Record that a shard is finished. Its files must be on disk under their final names."""
        self._write(self._record_path(record.source), record.to_json())

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
        self.unfinished.remove_to_start_over()
        for directory in (self._records, self._uploads, self._sidecars):
            with suppress(OSError):  # it may hold other files
                directory.rmdir()
        # Last: after a kill half-way, the directory still says which files are ours.
        remove_files(self._output, [self._conversion_path.relative_to(self._output).as_posix()])

    def _write(self, path: Path, document: Any) -> None:
        write_file(path, _to_bytes(document), below=self._output, aside=self.unfinished.aside)

    def _record_path(self, shard: ShardSource) -> Path:
        return self._records / _json_name(shard)

    def _upload_path(self, shard: ShardSource) -> Path:
        return self._uploads / _json_name(shard)

    def _refuse_foreign_files(self, conversion: Conversion) -> None:
        ours = [self._output / name for name in conversion.files]
        ours += [self._record_path(shard) for shard in conversion.shards] + [self.unfinished.partial_directory]
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
