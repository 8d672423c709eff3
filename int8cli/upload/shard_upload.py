"""One finished shard on its way to a repository or an object store: uploaded, recorded and, if wanted, removed here.

Owns this order, and what makes it safe to repeat: the record of an upload is written once the target has all files, and
a file is removed only after that.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from int8cli.checkpoint.output_names import remove_files
from int8cli.conversion.destination import HandOn
from int8cli.errors import Int8cliError
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore
from int8cli.records.upload_record import UploadedFile, UploadRecord
from int8cli.upload.contents import conversion_file, shard_file
from int8cli.upload.target import Target

# Called with the name of a shard, the bytes of one of its files, and how many of them were sent.
OnFile = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ShardUpload:
    """Uploads shards of the conversion in `directory`. Without `keep` they are removed once the target has them."""

    target: Target
    directory: Path
    store: RecordStore
    keep: bool

    def is_done(self, record: ShardRecord) -> bool:
        """Whether the target has the shard, as recorded."""
        upload = self.store.uploaded(record.source)
        return upload is not None and upload.repository == self.target.name

    def send(self, record: ShardRecord, on_file: OnFile) -> UploadRecord | None:
        """Upload a shard that is here.

        Returns what to record, or None if there is nothing: the target takes its files with the commit, or another
        process that has the same shard has sent and removed it meanwhile.
        """
        taken = []
        self.target.claim(conversion_file(self.directory))
        for file in record.files:
            try:
                found = shard_file(self.directory, file)
                uploaded = self.target.upload(found)
            except (Int8cliError, OSError):
                if self.is_done(record):
                    return None
                raise
            if uploaded.how != "for the commit":
                taken.append(UploadedFile(found.name, found.size_bytes, found.sha256, uploaded.mark))
            on_file(record.source.output, file.size_bytes, found.size_bytes if uploaded.how == "sent" else 0)
        return UploadRecord(self.target.name, tuple(taken)) if len(taken) == len(record.files) else None

    def conclude(self, record: ShardRecord, upload: UploadRecord | None) -> None:
        """Record what was sent, if anything is to be recorded, and remove the files."""
        if upload is not None:
            self.store.add_upload(record.source, upload)
            self.remove(record)

    def remove(self, record: ShardRecord) -> None:
        """Remove the files of a shard that the target has, unless they are kept."""
        if not self.keep:
            remove_files(self.directory, [file.file for file in record.files])


@dataclass(frozen=True, slots=True)
class UploadFromWorker(HandOn):
    """Uploads what a worker has converted, from there. `opens` opens the target on that machine."""

    opens: Callable[[], Target]
    keep: bool

    def __call__(self, store: RecordStore, record: ShardRecord) -> UploadRecord | None:
        with closing(self.opens()) as target:
            upload = ShardUpload(target, store.output, store, self.keep)
            if upload.is_done(record):
                upload.remove(record)
            else:
                upload.conclude(record, upload.send(record, lambda *_: None))
            return store.uploaded(record.source) if upload.is_done(record) else None
