"""Uploads the shards of a conversion to a repository while others are converted, and commits all files at the end.

Owns the thread, and what a later run trusts: the record of an upload, once the repository has confirmed it.
"""

import threading
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path

from int8cli.conversion.destination import Destination
from int8cli.errors import ShardsRemovedError
from int8cli.progress import Progress
from int8cli.records.conversion import Conversion, ShardSource
from int8cli.records.shard_record import ShardRecord
from int8cli.records.store import RecordStore
from int8cli.records.upload_record import CommitRecord
from int8cli.results.push import Pushed
from int8cli.results.units import counted
from int8cli.upload.contents import all_names, shard_file, side_files, uploaded_files
from int8cli.upload.shard_upload import ShardUpload
from int8cli.upload.target import Target, refuse_one_directory

TASK = "upload"


class ShardUploads(Destination):
    """A repository or an object store as the destination of a conversion in `directory`.

    One shard is uploaded at a time. While one is, the next may be converted, but not a further one. Without
    `keep_output` a shard is removed once the repository has it, so that the disk holds a few shards in all.
    """

    def __init__(
        self,
        target: Target,
        directory: Path,
        sizes: Mapping[str, int],
        message: str | None,
        progress: Progress,
        *,
        keep_output: bool = True,
        token: str | None = None,
    ) -> None:
        """`sizes` are the bytes to upload for each shard, by its output. `message` is that of the commit.

        `token` is that of a process which shares the directory with others, as in RecordStore.
        """
        self._target = target
        self._directory = directory
        self._store = RecordStore(directory, token)
        self._upload = ShardUpload(target, directory, self._store, keep_output)
        self._sizes = sizes
        self._message = message
        self._progress = progress
        self._waiting: deque[ShardRecord] = deque()
        self._changed = threading.Condition()
        self._uploading = False
        self._uploaded_bytes = 0
        self._closed = self._settled = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def resume(self, conversion: Conversion, shards: Collection[ShardSource]) -> Mapping[str, ShardRecord]:
        refuse_one_directory(self._target, self._directory)
        self._target.prepare(all_names(conversion, self._store))
        there = self._confirmed(conversion, shards)
        self._progress.begin(TASK, self._sizes, finished={shard.output for shard in there})
        found = {}
        for shard in shards:
            record = self._store.record(shard)
            if record is None:
                continue
            if shard in there:
                self._upload.remove(record)
                found[shard.file] = record
            elif self._store.finished(shard) is not None:
                self._enqueue(record)
        return found

    def add(self, record: ShardRecord) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._busy)
        self._raise_error()
        self._enqueue(record)

    def taken(self, record: ShardRecord) -> None:
        self._count(record.source.output, sum(file.size_bytes for file in record.files), 0)
        self._done(record)

    def settle(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._busy)
        self._raise_error()
        if not self._settled:
            self._settled = True
            self._progress.done(TASK)

    def publish(self, conversion: Conversion, records: Mapping[str, ShardRecord]) -> Pushed:
        self.settle()
        self._say_what_is_not_here(conversion)
        files = side_files(self._directory, conversion, self._store)
        for shard in conversion.shards:
            upload = self._store.uploaded(shard)
            if upload is not None and upload.repository == self._target.name:
                files += uploaded_files(upload)
            else:  # a repository that keeps small files in git takes them in the commit
                files += [shard_file(self._directory, file) for file in records[shard.file].files]
        commit = self._target.commit(files, self._message or f"{conversion.source.name} in LLM.int8(), by int8cli")
        repository, revision = self._target.name, self._target.revision
        self._store.add_commit(CommitRecord(repository, revision, commit.oid))
        done = "pushed to" if commit.made else "already in"
        name = f", commit {commit.oid[:12]}" if revision else ""
        self._progress.note(f"{done} {self._target.label}: {len(files):,} files{name}")
        size_bytes = sum(file.size_bytes for file in files)
        return Pushed(repository, revision, commit.oid, commit.made, len(files), size_bytes, self._uploaded_bytes)

    def _say_what_is_not_here(self, conversion: Conversion) -> None:
        """Shards that an earlier run removed are not converted again, even if this one keeps what it converts."""
        gone = self._store.removed(conversion)
        if gone and self._upload.keep:
            shards = f"{len(gone)} of {counted(len(conversion.shards), 'shard')}"
            self._progress.note(f"{self._directory} lacks {shards}: only {self._target.label} has them")

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._target.close()

    @property
    def _busy(self) -> bool:
        return self._uploading or bool(self._waiting)

    def _confirmed(self, conversion: Conversion, shards: Collection[ShardSource]) -> set[ShardSource]:
        """The shards that the repository has. Forgets uploads that it does not have, or that went elsewhere.

        Raises ShardsRemovedError for a shard that only another repository has.
        """
        uploads = {shard: upload for shard in shards if (upload := self._store.uploaded(shard))}
        here = {shard for shard in uploads if self._store.finished(shard) is not None}
        elsewhere = {shard for shard, each in uploads.items() if each.repository != self._target.name}
        self._refuse_elsewhere(conversion, {uploads[shard].repository for shard in elsewhere - here})
        ours = {shard: upload for shard, upload in uploads.items() if shard not in elsewhere}
        missing = self._target.missing([file for upload in ours.values() for file in uploaded_files(upload)])
        lost = {shard for shard, upload in ours.items() if any(file.file in missing for file in upload.files)}
        for shard in lost | elsewhere:
            self._store.forget_upload(shard)
        for shard in sorted(lost - here, key=lambda shard: shard.output):
            self._progress.note(f"{shard.output}: {self._target.name} does not have it any more")
        return set(ours) - lost

    def _refuse_elsewhere(self, conversion: Conversion, repositories: set[str]) -> None:
        if repositories:
            names = " and ".join(sorted(repositories))
            raise ShardsRemovedError(
                f"{self._directory}: shards of {conversion.source.name} were uploaded to {names} and removed here",
                hint=f"Push to {names} to continue, or choose another directory.",
            )

    def _enqueue(self, record: ShardRecord) -> None:
        with self._changed:
            self._waiting.append(record)
            if self._thread is None:
                thread = threading.Thread(target=self._run, daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._uploading = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                record = self._waiting.popleft()
                self._uploading = True
            try:
                self._send(record)
            except BaseException as error:  # `add` and `publish` raise it
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return

    def _send(self, record: ShardRecord) -> None:
        name = record.source.output
        self._progress.advance(TASK, name, 0)
        upload = self._upload.send(record, self._count)
        with self._changed:
            if self._closed:  # the directory may be another run's by now
                return
            self._upload.conclude(record, upload)
        self._done(record)

    def _done(self, record: ShardRecord) -> None:
        """A sidecar may have fewer columns than were planned for: what it lacks is done too."""
        name = record.source.output
        size_bytes = sum(file.size_bytes for file in record.files)
        self._progress.advance(TASK, name, self._sizes.get(name, size_bytes) - size_bytes)
        self._progress.done(TASK, name)

    def _count(self, name: str, size_bytes: int, sent_bytes: int) -> None:
        self._uploaded_bytes += sent_bytes
        self._progress.advance(TASK, name, size_bytes)

    def _raise_error(self) -> None:
        with self._changed:
            error = self._error
        if error is not None:
            raise error
