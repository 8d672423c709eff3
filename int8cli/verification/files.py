"""Checks that every byte of the shards is as it was written. Several threads read each file once, in pieces.

Owns the reading. It relies on the records alone, so that a manipulated header cannot hide a changed tensor.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from int8cli.checkpoint.digest import new_digest
from int8cli.checkpoint.disk import reading_error
from int8cli.checkpoint.header import read_header
from int8cli.checkpoint.reader import FileReader, open_to_read
from int8cli.errors import Int8cliError
from int8cli.progress import Progress
from int8cli.records.shard_record import FileRecord
from int8cli.results.verification import Failure
from int8cli.workers.threads import run_in_threads

READ = "read"
PIECE_BYTES = 1 << 20
_REPORT_EVERY_BYTES = 1 << 24  # drawing a progress bar takes longer than reading one piece
NOT_AS_WRITTEN = "its bytes differ from those that were written"


@dataclass(frozen=True, slots=True)
class _Span:
    """The place of a tensor's bytes in a file, and their recorded digest."""

    file: str
    tensor: str
    offset_bytes: int
    size_bytes: int
    xxh3_128: str


class DigestPass:
    """One pass over files that compares them with their records. Call `run` once.

    Advances the task READ of `progress`, which the caller must begin.
    """

    def __init__(self, directory: Path, records: Sequence[FileRecord], threads: int, progress: Progress) -> None:
        self._directory = directory
        self._records = records
        self._threads = threads
        self._progress = progress
        self._left_bytes = {record.file: record.size_bytes - record.header_bytes for record in records}
        self._failures: list[Failure] = []
        self._lock = threading.Lock()
        self._spans: Iterator[_Span] = iter(())
        self._error: BaseException | None = None

    def run(self) -> list[Failure]:
        """Every difference, in the order of the records."""
        sound = [record for record in self._records if self._is_worth_reading(record)]
        self._spans = (span for record in sound for span in _spans(record))
        run_in_threads(self._work, self._threads, self._stop)
        if self._error is not None:
            raise self._error
        order = {record.file: place for place, record in enumerate(self._records)}
        return sorted(self._failures, key=lambda failure: (order[failure.file], failure.tensor or ""))

    def _is_worth_reading(self, record: FileRecord) -> bool:
        """Check the size and header of a file. False if it is a different file: then one failure is enough."""
        path = self._directory / record.file
        try:
            size_bytes = path.stat().st_size
        except FileNotFoundError:
            self._failures.append(Failure(record.file, "is missing"))
            return False
        except OSError as error:
            self._failures.append(Failure(record.file, str(reading_error(path, error))))
            return False
        if size_bytes != record.size_bytes:
            problem = f"has {size_bytes:,} bytes; {record.size_bytes:,} were written"
            self._failures.append(Failure(record.file, problem))
            return False
        return self._has_its_own_header(path, record)

    def _has_its_own_header(self, path: Path, record: FileRecord) -> bool:
        """Check the header. False if it is the header of another recorded file."""
        try:
            other = _file_with_this_header(path, record, self._records)
            problem = f"is {other} under another name" if other else _header_problem(path, record)
        except Int8cliError as error:
            other, problem = None, str(error)
        if problem is not None:
            self._failures.append(Failure(record.file, problem))
        return other is None

    def _work(self) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        opened: tuple[str, FileReader] | None = None
        try:
            while True:
                with self._lock:
                    span = next(self._spans, None)
                if opened is not None and (span is None or span.file != opened[0]):
                    opened[1].close()
                    opened = None
                if span is None:
                    return
                if opened is None:
                    opened = (span.file, FileReader(self._directory / span.file))
                self._compare(span, opened[1], buffer)
        except BaseException as error:
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._spans = iter(())

    def _compare(self, span: _Span, reader: FileReader, buffer: memoryview) -> None:
        digest = new_digest()
        problem, reported = None, 0
        try:
            for start in range(0, span.size_bytes, PIECE_BYTES):
                end = min(start + PIECE_BYTES, span.size_bytes)
                piece = buffer[: end - start]
                reader.read_into(span.offset_bytes + start, piece)
                digest.update(piece)
                if end - reported >= _REPORT_EVERY_BYTES or end == span.size_bytes:
                    self._advance(span.file, end - reported)
                    reported = end
            if digest.hexdigest() != span.xxh3_128:
                problem = NOT_AS_WRITTEN
        except Int8cliError as error:
            problem = str(error)
        if problem is not None:
            with self._lock:
                self._failures.append(Failure(span.file, problem, span.tensor))

    def _advance(self, file: str, count: int) -> None:
        self._progress.advance(READ, file, count)
        with self._lock:
            self._left_bytes[file] -= count
            finished = self._left_bytes[file] == 0
        if finished:
            self._progress.done(READ, file)


def _spans(record: FileRecord) -> Iterator[_Span]:
    offset_bytes = record.header_bytes
    for tensor in record.tensors:
        yield _Span(record.file, tensor.name, offset_bytes, tensor.size_bytes, tensor.xxh3_128)
        offset_bytes += tensor.size_bytes


def _header_problem(path: Path, record: FileRecord) -> str | None:
    """What is wrong with a file's header, by its digest and its content; None if it is right. Raises Int8cliError."""
    if _header_digest(path, record) != record.header_xxh3_128:
        return "its header differs from the one that was written"
    with open_to_read(path, record.file) as file:
        tensors = read_header(file, record.file, record.size_bytes).tensors
    # By name, not in order: empty tensors share an offset with others.
    actual = {t.spec.name: (t.spec.dtype, t.spec.shape, t.offset_bytes) for t in tensors}
    spans = {span.tensor: span.offset_bytes for span in _spans(record)}
    if actual != {t.name: (t.dtype, t.shape, spans[t.name]) for t in record.tensors}:
        return "its header and its record name different tensors"
    return None


def _file_with_this_header(path: Path, record: FileRecord, all_records: Sequence[FileRecord]) -> str | None:
    """The name of another recorded file with the same size and header as this file; None if there is none."""
    alike = [other for other in all_records if other.size_bytes == record.size_bytes]
    if len(alike) == 1 or _header_digest(path, record) == record.header_xxh3_128:
        return None
    return next((other.file for other in alike if _header_digest(path, other) == other.header_xxh3_128), None)


def _header_digest(path: Path, record: FileRecord) -> str:
    """The digest of the file's first bytes, as many as the recorded header has."""
    header = memoryview(bytearray(max(record.header_bytes, 0)))
    with closing(FileReader(path)) as reader:
        reader.read_into(0, header)
    digest = new_digest()
    digest.update(header)
    return digest.hexdigest()
